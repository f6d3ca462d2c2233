"""The published forms that a converted model can be written in, as data: names, configuration, and what they cannot hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converters.encoder_naming import naming_of
from converters.families import family_named
from converters.family import Family
from converters.rules import bias_of, expand
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.schema import params_of_no_site, schema, sites

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class ExportFormat:
    """A form that others' tools read.

    Attributes:
      name: what the user calls it.
      family: the family that reads it back.
      rule: which of the family's rules, from 0, has the names that are written.
      architecture: class name in config.json, ``{base}`` standing for that of the base model.
      added: further entries of config.json, from the compression method and the rank by module path.
      block_biases: base models whose classes keep biases of factorized projections as buffers of the block (``q_bias``).
      head: whether the output head may be factorized.
      reader: what is needed to run it in PyTorch.
    """

    name: str
    family: Family
    rule: int
    architecture: str
    added: Callable[[str, Mapping[str, int]], dict[str, Any]]
    block_biases: tuple[str, ...]
    head: bool
    reader: str

    def model_type(self, base: str) -> str:
        """What config.json says in place of the base model's type."""
        return next(own for own, of in self.family.model_types if of == base)

    def config(self, hf: Mapping[str, Any], base: str, method: str, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The configuration to write, from the base model's."""
        own = {"model_type": self.model_type(base), "architectures": [self.architecture.format(base=_CLASSES[base])]}
        return {key: value for key, value in hf.items() if key != "auto_map"} | own | self.added(method, ranks)

    def factors(self, module: str) -> tuple[str, str]:
        """Names of a projection's first and second factor."""
        return self.family.pairs[self.rule].names(module)

    def bias(self, module: str, base: str) -> str:
        """Name of a factorized projection's bias."""
        if base in self.block_biases:
            return expand("{parent}.{stem}_bias", module)
        return bias_of(self.factors(module)[1])

    def names(self, config: AnyConfig) -> Iterator[tuple[str, str]]:
        """Every array's name here and in the form, in the order of the schema; shared ones under each of their names."""
        naming = naming_of(config)
        published = {name: naming.parameter(name)[0] for name in params_of_no_site(config)}
        for site in sites(config):
            module = naming.module(site.name)
            low_rank = config.factorization.rank(site.name) is not None
            if low_rank:
                first, second = self.factors(module)
                published |= {f"{site.name}.down": first, f"{site.name}.up": second}
            else:
                published[f"{site.name}.weight"] = f"{module}.weight"
            if site.has_bias:
                published[f"{site.name}.bias"] = self.bias(module, config.model_type) if low_rank else f"{module}.bias"
        yield from ((name, published[name]) for name in schema(config))

    def problems(self, config: AnyConfig, copy_shared: bool) -> Iterator[str]:
        """Why a model cannot be written in this form, one sentence each."""
        bases = [base for _, base in self.family.model_types if base in _CLASSES]
        if config.model_type not in bases:
            yield f"it has no form for {config.model_type}, only for {', '.join(bases)}"
        if not config.factorization:
            yield "the model is dense, with no factors that need a form of their own"
        for site, groups in config.factorization.groups:
            yield f"{site} has {groups} block-diagonal second factors, and it holds one full matrix"
            break
        if config.factorization.shared and not copy_shared:
            name, owner = config.factorization.shared[0]
            count = len(config.factorization.shared)
            yield (
                f"{count} arrays are shared ({name} is {owner}), and it has each projection's factors by themselves; "
                "--copy-shared writes them once for every projection"
            )
        if not self.head and config.factorization.rank("lm_head") is not None:
            yield "the output head is factorized, and it has no name for factors of a head"


EXPORT_FORMATS: tuple[ExportFormat, ...] = (
    ExportFormat(
        name="lowrankarena",
        family=family_named("lowrankarena"),
        rule=0,
        architecture="LowRank{base}ForCausalLM",
        added=lambda method, ranks: {
            "low_rank_schema": "ABLinear",
            "low_rank_format_version": 1,
            "low_rank_method": method,
            "low_rank_modules": {module: {"rank": rank} for module, rank in ranks.items()},
        },
        block_biases=(),
        head=True,
        reader=(
            "LowRankArena's model code, or the base model's class with two linear layers, ALinear(BLinear(x)), in place of every "
            "module that low_rank_modules in config.json names"
        ),
    ),
    ExportFormat(
        name="svdllm",
        family=family_named("svdllm_hf"),
        rule=1,
        architecture="SVD{base}ForCausalLM",
        added=lambda method, ranks: {"svd_ranks": dict(ranks)},
        block_biases=("qwen2", "qwen3"),
        head=False,
        reader=(
            "SVD-LLM's model classes with the ranks of svd_ranks in config.json, or any that compute q_u_proj(q_v_proj(x)) in "
            "place of q_proj; the safetensors are their state dict, as no module is pickled"
        ),
    ),
)
