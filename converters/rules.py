"""How a family names the two factors of a projection, and which of two matrices comes first by their shapes."""

import math
import re
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Reading = Literal["as named", "swapped", "either", "neither"]

_ENCODER_MODULE = (
    r"(?:model\.)?layers\.\d+\.(?:attn\.(?:Wqkv|Wo)|mlp\.(?:Wi|Wo))|"
    r"(?:(?:bert|roberta|distilbert)\.)?(?:encoder|transformer)\.layer\.\d+\."
    r"(?:attention\.(?:self\.(?:query|key|value)|output\.dense|[qkv]_lin|out_lin)|(?:intermediate|output)\.dense|ffn\.lin[12])"
)

_DECODER_MODULE = (
    r"(?:language_model\.)?model\.(?:language_model\.)?layers\.\d+\."
    r"(?:self_attn\.(?:[qkvo]|qkv)_proj|mlp\.(?:gate|up|down|gate_up)_proj)|lm_head|"
    r"(?:(?:model\.)?decoder\.)?layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|fc[12])|"
    r"(?:transformer\.)?h\.\d+\.(?:attn\.c_(?:attn|proj)|mlp\.c_(?:fc|proj))"
)

# What a placeholder stands for, as a regular expression over the names of decoders and encoders.
_PLACEHOLDERS = {
    "module": rf"(?:{_DECODER_MODULE}|{_ENCODER_MODULE})",
    "parent": r"(?:model\.layers\.\d+\.(?:self_attn|mlp)|(?:(?:model\.)?decoder\.)?layers\.\d+(?:\.self_attn)?)",
    "stem": r"(?:[qkvo]|gate|up|down|out|fc[12])",
    "layer": r"\d+",
}


@dataclass(frozen=True)
class PairRule:
    """The weights of the layers in ``y = second(first(x))``, as templates.

    ``{module}`` is the projection's path in the original model, such as ``model.layers.0.self_attn.q_proj``;
    ``{parent}`` that of the block around it (``model.layers.0.self_attn``), ``{stem}`` its short name there (``q``),
    ``{layer}`` the number of its layer.

    Attributes:
      first: name of the weight [rank, d_in].
      second: name of the weight [d_out, rank]; a bias, if there is one, is this layer's.
    """

    first: str
    second: str

    def names(self, module: str) -> tuple[str, str]:
        """Names of the first and second weight of a projection."""
        return expand(self.first, module), expand(self.second, module)

    def matches(self, name: str) -> bool:
        """Whether a tensor is a factor under this rule."""
        return any(re.fullmatch(_pattern(template), name) for template in (self.first, self.second))


def expand(template: str, module: str) -> str:
    """Fills a template in for one projection."""
    parent, _, leaf = module.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    return template.format(
        module=module, parent=parent, stem=leaf.removesuffix("_proj"), layer=layer[1] if layer else ""
    )


def bias_names(module: str, second: str | None = None) -> tuple[str, ...]:
    """Where a projection's bias may be stored: on the second factor, on the module, or as a buffer of the block."""
    names = (f"{module}.bias", expand("{parent}.{stem}_bias", module))
    return names if second is None else (bias_of(second), *names)


def bias_of(weight: str) -> str:
    """The bias of the layer whose weight has this name."""
    return weight.removesuffix(".weight") + ".bias"


def read_shapes(first: Shape, second: Shape, d_out: int, d_in: int) -> Reading:
    """Which of two matrices can be applied first in a projection from ``d_in`` to ``d_out`` features.

    Args:
      first: shape of the matrix whose name says that it comes first.
      second: shape of the other one.
      d_out: features the projection makes.
      d_in: features it reads.

    Returns:
      "either" only where both are square and of the same size; "neither" where they do not form this projection at all.
    """
    named, swapped = _composes(first, second, d_out, d_in), _composes(second, first, d_out, d_in)
    if named and swapped:
        return "either"
    return "as named" if named else "swapped" if swapped else "neither"


def _composes(down: Shape, up: Shape, d_out: int, d_in: int) -> bool:
    """Whether down [rank, d_in] and up [d_out, rank] do, or up in groups [groups, d_out / groups, rank of a group]."""
    if len(down) != 2 or len(up) not in (2, 3) or down[0] == 0:
        return False
    groups = up[0] if len(up) == 3 else 1
    return (down[1], math.prod(up[:-1])) == (d_in, d_out) and down[0] == groups * up[-1]


def _pattern(template: str) -> str:
    pattern = re.escape(template)
    for name, meaning in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), meaning)
    return pattern
