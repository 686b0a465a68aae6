"""Weights of the reference packages to ours and back, exactly; `models.references` has the tables.

A key that is missing, or that no table foresees, is an error. One module depends on the widths: the UNETRs' first
residual block has a projection (`stem.conv3`) only where feature_size differs from in_channels, as the shape of its
first convolution shows.
"""

from __future__ import annotations

from collections.abc import Mapping

from models import find_network
from models.references import Reference, StateDict

STEM = "stem.conv1.weight"  # (feature_size, in_channels, 3, 3, 3)


def from_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of a reference model as weights of ours.

    Args:
        name: of our network, in `models.NETWORKS`.
        state_dict: of the reference model, any widths.
        num_heads: heads of the reference model; used for "unetr" only.

    Returns:
        state dict that `build_model(name, ...)` of the same widths loads with strict=True.

    Raises:
        ValueError: an unknown name, or one without a reference; keys missing or unexpected, which are named; heads that
            do not fit.
    """
    reference = _reference(name)
    table = {theirs: ours for ours, theirs in _key_table(reference, state_dict).items()}
    return _rename(reference.incoming(state_dict, num_heads), table, f"the reference of {name!r}")


def to_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of ours as weights of the reference model: the inverse of `from_reference`, same arguments and errors."""
    reference = _reference(name)
    renamed = _rename(state_dict, _key_table(reference, state_dict), f"our {name!r}")
    return reference.outgoing(renamed, num_heads)


def _reference(name: str) -> Reference:
    reference = find_network(name).reference
    if reference is None:
        raise ValueError(f"no other package has our {name}: its weights can't be converted")
    return reference


def _key_table(reference: Reference, state_dict: StateDict) -> Mapping[str, str]:
    """Our key -> the reference's; whether the stem has a projection is read from `state_dict`, ours or theirs."""
    table = reference.keys
    stem = state_dict.get(STEM, state_dict.get(table.get(STEM, "")))
    if stem is not None and stem.shape[0] == stem.shape[1]:
        table = {ours: theirs for ours, theirs in table.items() if not ours.startswith("stem.conv3.")}
    return table


def _rename(state_dict: StateDict, table: Mapping[str, str], what: str) -> StateDict:
    missing, unexpected = sorted(table.keys() - state_dict.keys()), sorted(state_dict.keys() - table.keys())
    if missing or unexpected:
        raise ValueError(
            f"these are not the weights of {what}: {len(missing)} keys missing{_first(missing)}, "
            f"{len(unexpected)} unexpected{_first(unexpected)}; give the state_dict "
            "of that model alone, without any prefix"
        )
    return {new: state_dict[old] for old, new in table.items()}


def _first(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return f" ({shown}{', ...' if len(keys) > 3 else ''})" if keys else ""
