"""``read_dictionary``: a dictionary in any of the known formats, told by what the files are."""

from __future__ import annotations

from pathlib import Path

from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats import circuit_tracer, dunefsky, openmoss, sae_lens

FORMATS = (
    "a folder of SAELens (cfg.json, sae_weights.safetensors), a folder of OpenMOSS "
    "(hyperparams.json), a circuit-tracer or Gemma Scope 2 transcoder (.safetensors), Gemma "
    "Scope's params.npz, or a transcoder of Dunefsky et al. (.pt)"
)


def read_dictionary(
    path: str | Path, hook_in: str | None = None, hook_out: str | None = None
) -> Dictionary:
    """A dictionary of another package, in whichever format it is; nothing of it is run.

    What a format does besides encoding and decoding (taking a bias off the input, constant
    normalisation, decoder rows that are not of length 1, scales and masks of features) is folded
    into the weights; ``metadata`` says how the model was loaded whose activations it was trained
    on, where the format does.

    Args:
        path: A file or folder.
        hook_in: Hook of what it reads, where the files do not say, or say it by another name.
        hook_out: Hook of what it stands for, likewise.

    Raises:
        FileNotFoundError: there is nothing, or a part of it is missing.
        ValueError: files that are damaged, in no known format, or of an architecture that is not
            one linear encoder, one activation function and one linear decoder.
    """
    place = Path(path)
    if place.is_dir():
        if (place / sae_lens.CONFIG).is_file():
            return sae_lens.read_sae_lens(place, hook_in, hook_out)
        if any((place / name).is_file() for name in openmoss.CONFIGS):
            return openmoss.read_openmoss(place, hook_in, hook_out)
        raise ValueError(f"{place} is in no known format: {FORMATS}")
    if not place.exists():
        raise FileNotFoundError(f"{place!s:.300} is missing")
    if place.suffix in (".npz", ".safetensors"):
        return circuit_tracer.read_circuit_tracer(place, hook_in, hook_out)
    if place.suffix == ".pt":
        return dunefsky.read_dunefsky(place, hook_in, hook_out)
    raise ValueError(f"{place} is in no known format: {FORMATS}")
