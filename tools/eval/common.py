"""What every part of tools/eval shares: the one kind of error, and where files go."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

INCEPTION_FILE = (
    "pt_inception-2015-12-05-6726825d.pth (release fid_weights of mseitzer/pytorch-fid on GitHub; the same file as "
    "weights-inception-2015-12-05-6726825d.pth, release v0.2.0 of toshas/torch-fidelity)"
)


class EvalError(Exception):
    """Something the user gave or the machine lacks: the message names it, its value and what to do."""


def fail_clearly(program, main):
    """Runs main() as `program`; an EvalError becomes one line on standard error and exit status 2."""
    try:
        sys.exit(main())
    except EvalError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{program}: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        sys.exit(2)


def sha256_file(path):
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def write_whole(path, data):
    """Writes bytes or text to path: the file appears complete or not at all."""
    path = Path(path)
    if isinstance(data, str):
        data = data.encode()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)  # mkstemp makes private files; a result is an ordinary one
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
