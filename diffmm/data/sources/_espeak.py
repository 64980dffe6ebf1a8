"""Worker process of the speech source: espeak-ng through ctypes.

Run as a file, never imported by the package: ``python _espeak.py OUTPUT.npz`` with a
JSON request on standard input. A process of its own because espeak-ng is not
re-entrant and carries the state of its noise and flutter generators from one
utterance to the next: the same list of utterances in a fresh process gives the same
samples, whatever the caller did before.
"""

import ctypes
import json
import pathlib
import sys

import numpy as np

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS_OUTPUT = 2
_DO_NOT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
_RATE, _PITCH = 1, 3


def main() -> None:
    """Speaks every utterance of the request; writes one npz of int16 samples."""
    request = json.load(sys.stdin)
    library = ctypes.CDLL(request["library"])
    sample_rate = library.espeak_Initialize(
        _SYNCHRONOUS_OUTPUT, 0, request["data"].encode(), _DO_NOT_EXIT
    )
    if sample_rate <= 0:
        sys.exit(f"espeak_Initialize failed with {sample_rate}")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )
    def receive(samples, count, _events):
        if samples and count > 0:
            # The buffer is espeak's own and is reused: copy.
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    clips = []
    for text, voice, rate, pitch in request["utterances"]:
        pieces.clear()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            sys.exit(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(_RATE, rate, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        status = library.espeak_Synth(
            data, len(data), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None
        )
        if status != 0 or not pieces:
            sys.exit(f"espeak-ng could not speak {text!r} as {voice!r} ({status})")
        clips.append(np.concatenate(pieces))
    lengths = np.asarray([len(clip) for clip in clips], np.int64)
    with pathlib.Path(sys.argv[1]).open("wb") as file:
        np.savez(
            file,
            samples=np.concatenate(clips),
            lengths=lengths,
            sample_rate=np.int64(sample_rate),
        )


if __name__ == "__main__":
    main()
