"""Expected values of the schedulers: tables, timesteps and whole trajectories of diffusers' classes.

The "model" of a trajectory is `0.1 * tanh(model_input) + 0.9 * fixed`, fixed per step: cheap, and different at each step.
A test feeds the stored model outputs; nothing has to be recomputed.
"""

import json

import torch
from safetensors.torch import save_file

from module_values import compact, normal

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (1, 4, 3, 5)
SMALL = (1, 2, 2, 3)
PIXELS = (1, 3, 2, 2)


def cases():
    """(name, class, config as in scheduler_config.json, steps, eta)"""
    out = []
    for spacing in ("leading", "trailing", "linspace"):
        for offset in (0, 1):
            config = SD | {"timestep_spacing": spacing, "steps_offset": offset, "clip_sample": False,
                           "set_alpha_to_one": False}
            out.append((f"ddim-{spacing}-{offset}", "DDIM", config, 7, 0.0))
    base = SD | {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    out += [
        ("ddim-50", "DDIM", base, 50, 0.0),
        ("ddim-eta", "DDIM", base, 6, 0.5),
        ("ddim-eta-1", "DDIM", base | {"prediction_type": "v_prediction"}, 6, 1.0),
        ("ddim-alpha-one", "DDIM", base | {"set_alpha_to_one": True}, 6, 0.0),
        ("ddim-clip", "DDIM", base | {"clip_sample": True}, 6, 0.0),
        ("ddim-clip-range", "DDIM", base | {"clip_sample": True, "clip_sample_range": 1.5}, 6, 0.5),
        ("ddim-v", "DDIM", base | {"prediction_type": "v_prediction"}, 6, 0.0),
        ("ddim-sample", "DDIM", base | {"prediction_type": "sample"}, 6, 0.5),
        ("ddim-defaults", "DDIM", {}, 6, 0.0),
        ("ddim-cosine", "DDIM", {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}, 6, 0.0),
        ("ddim-zero-snr", "DDIM", base | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                          "timestep_spacing": "trailing"}, 6, 0.0),
        ("ddim-one-step", "DDIM", base, 1, 0.0),
    ]
    for spacing in ("leading", "trailing", "linspace"):
        config = SD | {"timestep_spacing": spacing, "steps_offset": 1, "clip_sample": False}
        out.append((f"ddpm-{spacing}", "DDPM", config, 6, None))
    config = SD | {"clip_sample": False}
    out += [
        ("ddpm-v", "DDPM", config | {"prediction_type": "v_prediction"}, 6, None),
        ("ddpm-sample", "DDPM", config | {"prediction_type": "sample"}, 6, None),
        ("ddpm-clip", "DDPM", SD, 6, None),
        ("ddpm-large", "DDPM", config | {"variance_type": "fixed_large"}, 6, None),
    ]
    for cls in ("EulerDiscrete", "EulerAncestralDiscrete"):
        short = "euler" if cls == "EulerDiscrete" else "euler-ancestral"
        for spacing in ("leading", "trailing", "linspace"):
            for offset in (0, 1):
                if spacing != "leading" and offset:
                    continue
                config = SD | {"timestep_spacing": spacing, "steps_offset": offset}
                out.append((f"{short}-{spacing}-{offset}", cls, config, 7, None))
        out += [
            (f"{short}-v", cls, SD | {"prediction_type": "v_prediction", "timestep_spacing": "leading",
                                      "steps_offset": 1}, 6, None),
            (f"{short}-defaults", cls, {}, 6, None),
        ]
    out += [
        ("euler-sample", "EulerDiscrete", SD | {"prediction_type": "sample"}, 6, None),
        ("euler-50", "EulerDiscrete", SD | {"timestep_spacing": "leading", "steps_offset": 1}, 50, None),
    ]
    pndm = SD | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    out += [
        ("pndm-leading", "PNDM", pndm, 8, None),
        ("pndm-v", "PNDM", pndm | {"prediction_type": "v_prediction"}, 8, None),
        ("dpm-leading", "DPMSolverMultistep", SD | {"timestep_spacing": "leading", "steps_offset": 1}, 8, None),
        ("dpm-linspace", "DPMSolverMultistep", SD, 20, None),
        ("dpm-v", "DPMSolverMultistep", SD | {"prediction_type": "v_prediction"}, 8, None),
    ]
    return out + more_cases(pndm)


def more_cases(pndm):
    """The multistep and two-evaluation samplers, and the spacings of sigmas."""
    out = [(f"pndm-{spacing}", "PNDM", pndm | {"timestep_spacing": spacing}, 8, None)
           for spacing in ("trailing", "linspace")]
    out += [("pndm-one-step", "PNDM", pndm, 1, None), ("pndm-50", "PNDM", pndm, 50, None)]
    v, sample = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
    offset = SD | {"steps_offset": 1}
    for short, cls, extra in (("dpm", "DPMSolverMultistep", {}),
                              ("dpm-sde", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
                              ("unipc", "UniPCMultistep", {})):
        base = offset | extra
        for spacing in ("leading", "trailing", "linspace"):
            out.append((f"{short}-{spacing}-7", cls, base | {"timestep_spacing": spacing}, 7, None))
        out += [
            (f"{short}-20", cls, base, 20, None),
            (f"{short}-one-step", cls, base, 1, None),
            (f"{short}-v-zero-snr", cls, base | v | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
             6, None),
            (f"{short}-sample", cls, base | sample, 6, None),
            (f"{short}-karras", cls, base | {"use_karras_sigmas": True}, 8, None),
            (f"{short}-exponential", cls, base | {"use_exponential_sigmas": True}, 8, None),
            (f"{short}-sigma-min", cls, base | {"final_sigmas_type": "sigma_min"}, 6, None),
            (f"{short}-order-1", cls, base | {"solver_order": 1}, 6, None),
            (f"{short}-cosine-threshold", cls, extra | {"beta_schedule": "squaredcos_cap_v2", "thresholding": True,
                                                        "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
             6, None),
        ]
    out += [
        ("dpm-euler-at-final", "DPMSolverMultistep",
         offset | {"euler_at_final": True, "final_sigmas_type": "sigma_min"}, 16, None),
        ("dpm-no-lower-order", "DPMSolverMultistep",
         offset | {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, 6, None),
        ("dpm-clipped", "DPMSolverMultistep",
         {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, 8, None),
        ("unipc-no-corrector", "UniPCMultistep", offset | {"disable_corrector": [0, 2]}, 6, None),
        ("unipc-no-lower-order", "UniPCMultistep",
         offset | {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, 6, None),
    ]
    for spacing in ("leading", "trailing", "linspace"):
        out.append((f"heun-{spacing}", "HeunDiscrete", offset | {"timestep_spacing": spacing}, 6, None))
    out += [
        ("heun-karras", "HeunDiscrete", offset | {"use_karras_sigmas": True}, 6, None),
        ("heun-v", "HeunDiscrete", offset | v, 6, None),
        ("heun-sample", "HeunDiscrete", offset | sample, 6, None),
        ("heun-clip", "HeunDiscrete", offset | {"clip_sample": True}, 6, None),
        ("heun-one-step", "HeunDiscrete", offset, 1, None),
        ("heun-defaults", "HeunDiscrete", {}, 5, None),
        ("lcm-4", "LCM", offset, 4, None),
        ("lcm-7", "LCM", offset | {"original_inference_steps": 40, "timestep_scaling": 0.01}, 7, None),
        ("lcm-v", "LCM", offset | v, 4, None),
        ("lcm-clip", "LCM", offset | {"clip_sample": True}, 4, None),
        ("lcm-one-step", "LCM", {}, 1, None),
        ("euler-karras", "EulerDiscrete", offset | {"use_karras_sigmas": True}, 8, None),
        ("euler-karras-leading", "EulerDiscrete", offset | {"use_karras_sigmas": True, "timestep_spacing": "leading"},
         8, None),
        ("euler-exponential", "EulerDiscrete", offset | {"use_exponential_sigmas": True}, 8, None),
        ("euler-log-linear", "EulerDiscrete", offset | {"interpolation_type": "log_linear"}, 8, None),
        ("euler-sigma-min", "EulerDiscrete", offset | {"final_sigmas_type": "sigma_min"}, 5, None),
        ("euler-zero-snr", "EulerDiscrete",
         offset | v | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, None),
        ("euler-turbo", "EulerDiscrete", offset | {"timestep_spacing": "trailing"}, 4, None),
        ("euler-ancestral-turbo", "EulerAncestralDiscrete", offset | {"timestep_spacing": "trailing"}, 4, None),
        ("ddim-threshold", "DDIM", {"beta_schedule": "squaredcos_cap_v2", "thresholding": True,
                                    "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}, 6, 0.0),
        ("ddpm-sigmoid", "DDPM", {"beta_schedule": "sigmoid", "clip_sample": False}, 6, None),
    ]
    return out


def small_cases():
    """DEIS, flow matching, and no signal at the last training timestep; of a few values each."""
    v, sample = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
    offset = SD | {"steps_offset": 1}
    out = [(f"deis-{spacing}", "DEISMultistep", offset | {"timestep_spacing": spacing}, 7, None)
           for spacing in ("leading", "trailing", "linspace")]
    out += [
        ("deis-20", "DEISMultistep", offset, 20, None),
        ("deis-one-step", "DEISMultistep", offset, 1, None),
        ("deis-v", "DEISMultistep", offset | v, 6, None),
        ("deis-sample", "DEISMultistep", offset | sample, 6, None),
        ("deis-karras", "DEISMultistep", offset | {"use_karras_sigmas": True}, 8, None),
        ("deis-exponential", "DEISMultistep", offset | {"use_exponential_sigmas": True}, 16, None),
        ("deis-order-1", "DEISMultistep", offset | {"solver_order": 1}, 6, None),
        ("deis-no-lower-order", "DEISMultistep", offset | {"lower_order_final": False}, 6, None),
        ("deis-cosine-threshold", "DEISMultistep",
         {"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.9,
          "sample_max_value": 1.5}, 6, None),
    ]
    flow = {"num_train_timesteps": 1000, "shift": 3.0}
    out += [
        ("flow-28", "FlowMatchEulerDiscrete", flow, 28, None),
        ("flow-defaults", "FlowMatchEulerDiscrete", {}, 5, None),
        ("flow-one-step", "FlowMatchEulerDiscrete", flow, 1, None),
        ("flow-karras", "FlowMatchEulerDiscrete", flow | {"use_karras_sigmas": True}, 6, None),
        ("flow-exponential", "FlowMatchEulerDiscrete", flow | {"use_exponential_sigmas": True}, 6, None),
        ("flow-terminal", "FlowMatchEulerDiscrete", flow | {"shift_terminal": 0.1}, 6, None),
        ("flow-stochastic", "FlowMatchEulerDiscrete", flow | {"stochastic_sampling": True}, 6, None),
    ]
    zero = offset | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    for short, cls in ZERO_SNR:
        out.append((f"{short}-v-zero-snr-trailing", cls, zero | v, 5, 0.0 if cls == "DDIM" else None))
        if cls not in DIVIDE_BY_ALPHA:
            out.append((f"{short}-eps-zero-snr-trailing", cls, zero, 5, None))
    # Not from the timestep without signal on, so that any class can.
    for short, cls in ZERO_SNR:
        if cls in DIVIDE_BY_ALPHA and cls != "LCM":
            out.append((f"{short}-eps-zero-snr-leading", cls, zero | {"timestep_spacing": "leading"}, 5,
                        0.0 if cls == "DDIM" else None))
    return out


def learned_cases():
    """DeepFloyd IF's stages, whose network predicts the variance of the noise for each value. DPM-Solver's class drops it."""
    stage_1 = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
               "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    # The last timestep is above 0, so that noise of the smallest variance that there is may be added there.
    trailing = stage_1 | {"thresholding": False, "timestep_spacing": "trailing"}
    return [
        ("ddpm-learned-stage-1", "DDPM", stage_1, 5, None),
        ("ddpm-learned-stage-2", "DDPM", stage_1 | {"sample_max_value": 1.0}, 4, None),
        ("ddpm-learned-trailing", "DDPM", trailing, 4, None),
        ("dpm-learned", "DPMSolverMultistep", stage_1, 4, None),
    ]


ZERO_SNR = (("ddim", "DDIM"), ("ddpm", "DDPM"), ("lcm", "LCM"), ("euler", "EulerDiscrete"),
            ("euler-ancestral", "EulerAncestralDiscrete"), ("heun", "HeunDiscrete"), ("dpm", "DPMSolverMultistep"),
            ("unipc", "UniPCMultistep"), ("deis", "DEISMultistep"))
# Their table ends at abar = 0, so that x0 = (x - eps) / 0. The others' ends at 2^-24, or (Heun, DEIS) is not rescaled.
DIVIDE_BY_ALPHA = ("DDIM", "DDPM", "LCM")


def check_what_divides_by_zero():
    """These classes make no picture of an epsilon where there is no signal."""
    config = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    for short, cls in ZERO_SNR:
        if cls in DIVIDE_BY_ALPHA:
            try:
                trajectory(short, cls, config, 5, 0.0 if cls == "DDIM" else None, {})
            except ValueError:
                continue
            raise AssertionError(f"{cls} does")


def trajectory(name, cls, config, steps, eta, tensors, shape=SHAPE):
    import diffusers

    scheduler = getattr(diffusers, f"{cls}Scheduler").from_config(dict(config))
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    shape = shape if steps < 20 else (1, 4, 1, 2)
    # A flow's class has neither: it starts from the noise, which the network reads as it is.
    init_noise_sigma = getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = torch.randn(shape, generator=generator) * init_noise_sigma
    inputs, outputs, samples, x0s, noises = [], [], [x], [], []
    for i, t in enumerate(scheduler.timesteps):
        model_input = scale(x, t)
        output = 0.1 * torch.tanh(model_input) + 0.9 * normal(5000 + i, *shape)
        if config.get("variance_type") == "learned_range":
            output = torch.cat([output, 0.6 * normal(6000 + i, *shape)], 1)  # beyond -1 to 1 at times, as the networks' are
        if cls == "DDIM":
            noise = torch.randn(shape, generator=generator) if eta > 0 else None
            step = scheduler.step(output, t, x, eta=eta, variance_noise=noise)
        elif cls in ("PNDM", "UniPCMultistep", "HeunDiscrete", "DEISMultistep"):
            noise = None
            step = scheduler.step(output, t, x)
        else:
            # These classes draw by themselves: replay the same draw to know the noise.
            state = generator.get_state()
            step = scheduler.step(output, t, x, generator=generator)
            drew = not torch.equal(state, generator.get_state())
            noise = None
            if drew:
                replay = torch.Generator()
                replay.set_state(state)
                noise = torch.randn(shape, generator=replay)
        inputs.append(model_input)
        outputs.append(output)
        noises.append(noise)
        x = step.prev_sample
        samples.append(x)
        if getattr(step, "pred_original_sample", None) is not None:
            x0s.append(step.pred_original_sample)
    tensors |= {f"{name}.timesteps": scheduler.timesteps.float(), f"{name}.samples": torch.cat(samples),
                f"{name}.model_outputs": torch.cat(outputs)}
    if cls.startswith(("Euler", "Heun")):
        tensors[f"{name}.model_inputs"] = torch.cat(inputs)
        tensors[f"{name}.sigmas"] = scheduler.sigmas.float()
    if x0s:
        tensors[f"{name}.pred_original"] = torch.cat(x0s)
    drawn = [n is not None for n in noises]
    if any(drawn):
        tensors[f"{name}.noise"] = torch.cat([torch.zeros(shape) if n is None else n for n in noises])
    if not torch.isfinite(x).all():
        raise ValueError(f"{name}: the published class makes NaN or infinity")
    return {"name": name, "class": f"{cls}Scheduler", "config": config, "steps": steps, "eta": eta, "draws": drawn,
            "init_noise_sigma": float(init_noise_sigma)}


def tables(tensors):
    """alphas_cumprod as diffusers holds it (f32), and re-scheduled for a gamma (computed in f64 from it)."""
    import diffusers

    for name, config in [("sd", SD), ("defaults", {}), ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
                         ("zero-snr", SD | {"rescale_betas_zero_snr": True})]:
        abar = diffusers.DDIMScheduler.from_config(dict(config)).alphas_cumprod
        tensors[f"alpha_bar.{name}"] = abar
        if name == "sd":
            for gamma in (1.0, 2.25, 4.0):
                a = abar.double()
                tensors[f"alpha_bar.sd.gamma-{gamma}"] = (a / (gamma - (gamma - 1) * a)).float()


def write(root):
    folder = root / "schedulers"
    folder.mkdir(parents=True)
    tensors = {}
    check_what_divides_by_zero()
    listed = [trajectory(*case, tensors) for case in cases()]
    listed += [trajectory(*case, tensors, SMALL) for case in small_cases()]
    listed += [trajectory(*case, tensors, PIXELS) for case in learned_cases()]
    tables(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "oracle.safetensors")
    (folder / "oracle.json").write_text(compact(json.dumps({"cases": listed}, indent=1)))
