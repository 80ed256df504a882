"""What DAS acts on: attention heads, intermediate neurons and output neurons of every layer."""

from das_lm.units.architectures import ARCHITECTURES, Architecture
from das_lm.units.discovery import Group, Slice, Units
from das_lm.units.gates import gated

__all__ = ["ARCHITECTURES", "Architecture", "Group", "Slice", "Units", "gated"]
