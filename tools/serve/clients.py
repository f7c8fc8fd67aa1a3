"""OpenAI's package and webuiapi against a server: what a user of either would do. Usage: clients.py http://ADDRESS"""

import base64
import os
import sys
import urllib.request
from urllib.parse import urlparse

import webuiapi
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

PNG = b"\x89PNG\r\n\x1a\n"


def refused(kind, call):
    try:
        call()
    except kind as error:
        print(f"  refused as it must be: {error}")
        return
    raise SystemExit("was not refused")


def openai(address, token):
    client = OpenAI(base_url=f"{address}/v1", api_key=token)
    print("openai: models", [model.id for model in client.models.list()])
    reply = client.images.generate(prompt="a red ball", n=2, size="64x64", extra_body={"megafuse": {"seed": 5}})
    assert [base64.b64decode(image.b64_json)[:8] for image in reply.data] == [PNG, PNG]
    url = client.images.generate(prompt="a red ball", response_format="url").data[0].url
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    assert urllib.request.urlopen(request).read()[:8] == PNG
    events = list(client.images.generate(prompt="a red ball", n=2, stream=True))
    assert [event.type for event in events] == ["image_generation.completed"] * 2, events
    refused(NotFoundError, lambda: client.images.generate(prompt="x", model="dall-e-3"))
    refused(BadRequestError, lambda: client.images.generate(prompt="x", size="65x64"))
    refused(AuthenticationError, lambda: OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list())


def webui(address, token):
    place = urlparse(address)
    api = webuiapi.WebUIApi(host=place.hostname, port=place.port)
    api.set_auth("anyone", token)
    print("webuiapi: models", api.util_get_model_names(), "samplers", [sampler["name"] for sampler in api.get_samplers()])
    common = {"seed": 5, "steps": 4, "width": 64, "height": 64, "cfg_scale": 2}
    first = api.txt2img(prompt="a red ball", sampler_name="DPM++ 2M Karras", batch_size=2, **common)
    assert len(first.images) == 2 and first.info["all_seeds"] == [5, 6], first.info
    print(" ", first.info["infotexts"][1].splitlines()[-1])
    enlarged = api.txt2img(prompt="a red ball", sampler_name="Euler", enable_hr=True, hr_scale=2, denoising_strength=0.5, **common)
    assert enlarged.image.size == (128, 128) and "hires-fix" in enlarged.info["infotexts"][0], enlarged.info
    again = api.img2img(images=[first.image], prompt="a blue cube", sampler_name="Euler", denoising_strength=0.5, **common)
    assert again.image.size == (64, 64)
    assert api.png_info(first.image).info.startswith("a red ball")
    assert api.get_progress()["progress"] == 0
    api.interrupt()
    refused(RuntimeError, lambda: api.txt2img(prompt="x", sampler_name="Magic", **common))


if __name__ == "__main__":
    openai(sys.argv[1], os.environ["MEGAFUSE_API_TOKEN"])
    webui(sys.argv[1], os.environ["MEGAFUSE_API_TOKEN"])
    print("both clients are served")
