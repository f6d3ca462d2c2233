"""Every family of checkpoints that is known, as data: how to recognise it and how it names its factors.

`FAMILIES` is ordered and the first match wins, so an entry with evidence in the configuration stands before those that
share its tensor names. A new family is an entry here and a test.
"""

from converters.adapters import CONFIG_FILE as ADAPTER_CONFIG
from converters.eigen_attention import EigenAttention
from converters.family import Family
from converters.gpt2_blocks import Gpt2Blocks
from converters.head_factors import FIRST, SECOND, HeadFactorSource
from converters.head_groups import CONFIG_KEY as HEAD_RANKS
from converters.head_groups import HeadGroups
from converters.modegpt import MODEGPT_KEYS, ReducedModules
from converters.reduced_widths import FIRST as ROWS
from converters.reduced_widths import SECOND as PLACES
from converters.residuals import BlockResiduals, DenseResiduals
from converters.rules import PairRule
from converters.shared_bases import CONFIG_KEYS, SharedBases
from converters.shared_firsts import SharedFirsts
from flashsvd_jax.config import MODEL_TYPES

_A_AFTER_B = PairRule("{module}.BLinear.weight", "{module}.ALinear.weight")
_B_AFTER_A = PairRule("{module}.ALinear.weight", "{module}.BLinear.weight")
_U_AFTER_V_IN_BLOCK = PairRule("{parent}.{stem}_v_proj.weight", "{parent}.{stem}_u_proj.weight")
_U_AFTER_V_IN_MODULE = PairRule("{module}.v_proj.weight", "{module}.u_proj.weight")

FAMILIES: tuple[Family, ...] = (
    Family(
        "quantized",
        "GPTQ, AWQ and other packed integer weights",
        key_pattern=r"\.(?:qweight|qzeros|weight_packed)$",
        refusal="its weights are packed integers; convert the checkpoint from before quantization",
    ),
    Family(
        "lowrankarena",
        "LowRankArena's ABLinear export (SVD-LLM, AA-SVD, ZS-SVD, Swift-SVD, GFWSVD and others)",
        pairs=(_A_AFTER_B,),
        config_keys=("low_rank_modules", "low_rank_schema"),
        model_types=tuple((f"lowrank_{base}", base) for base in MODEL_TYPES),
        architectures=("LowRank",),
        config_values=(("low_rank_schema", "ABLinear"), ("low_rank_format_version", 1)),
        rank_map="low_rank_modules",
    ),
    Family(
        "dobi",
        "Dobi-SVD without remapping, Hugging Face export",
        pairs=(_B_AFTER_A,),
        config_keys=("dobi_target_modules",),
        architectures=("DobiSVD",),
        rank_map="dobi_target_modules",
    ),
    Family(
        "dobi_remapped",
        "Dobi-SVD with remapped 8-bit factors",
        pairs=(PairRule("{module}.vt.weight", "{module}.us.weight"),),
    ),
    Family(
        "asvd",
        "ASVD, Hugging Face export",
        pairs=(_A_AFTER_B,),
        config_keys=("truncation_ranks",),
        model_types=tuple((f"asvd_{base}", base) for base in MODEL_TYPES),
        architectures=("ASVD",),
        rank_map="truncation_ranks",
    ),
    Family(
        "basis_sharing",
        "Basis Sharing, with one rank for all groups or a rank for each",
        pairs=(PairRule("model.{stem}_basis.{layer}.weight", "{module}.weight"),),
        architectures=("Share",),
        key_pattern=r"(?:^|\.)(?:q|k|v|o|gate|up|down|attn)_basis\.",
        added_keys=CONFIG_KEYS,
        view=SharedBases,
    ),
    Family(
        "palu",
        "Palu, groups of heads with second factors of their own",
        pairs=(PairRule("{module}.VT.weight", "{module}.U.weight"),),
        model_types=tuple((f"palu{base}", base) for base in ("llama", "mistral", "qwen2")),
        architectures=("Palu",),
        key_pattern=r"_proj\.(?:VT|U\.\d+)\.weight$",
        added_keys=(HEAD_RANKS, "original_model_name_or_path", "k_bits", "v_bits"),
        view=HeadGroups,
    ),
    Family(
        "lems",
        "LEMS and KFAC-SVD",
        pairs=(PairRule("{module}.mod_a.weight", "{module}.mod_b.weight"),),
        rank_map="rank_dict",
        prefix="wrapped_model.",
        names="hint",
    ),
    Family(
        "modegpt",
        "MoDeGPT's Llama, narrower heads and feed-forward layers",
        pairs=(PairRule(ROWS, PLACES),),
        config_keys=("mask_path", "q_ranks"),
        added_keys=MODEGPT_KEYS,
        view=ReducedModules,
    ),
    Family(
        "eigen_attention",
        "Eigen Attention's Llama, narrower heads",
        pairs=(PairRule(ROWS, PLACES),),
        key_pattern=r"\.[qkv]_proj_low\.",
        view=EigenAttention,
    ),
    Family(
        "svdllm_hf",
        "SVD-LLM, Hugging Face export",
        pairs=(_U_AFTER_V_IN_MODULE, _U_AFTER_V_IN_BLOCK),
        config_keys=("svd_ranks",),
        model_types=tuple((f"svdllm-{base}", base) for base in ("llama", "mistral", "qwen2", "qwen3")),
        architectures=("SVDLLM", "SVDLlama"),
        rank_map="svd_ranks",
    ),
    Family(
        "svdllm",
        "SVD-LLM's names, v2's too; also DipSVD, and Swift-SVD, whose u comes first",
        pairs=(_U_AFTER_V_IN_BLOCK,),
        names="hint",
        fixed_rope=True,
    ),
    Family(
        "fisher_svd",
        "Fisher-SVD, dense blocks beside its factors",
        pairs=(_U_AFTER_V_IN_MODULE,),
        key_pattern=r"\.g\d+_blocks_T$",
        names="hint",
        view=BlockResiduals,
    ),
    Family("zs_svd", "ZS-SVD", pairs=(_U_AFTER_V_IN_MODULE,), names="hint"),
    Family(
        "aa_svd",
        "AA-SVD and other U/V pairs",
        pairs=(PairRule("{module}.V.weight", "{module}.U.weight"),),
        names="hint",
    ),
    Family(
        "sequential",
        "nn.Sequential pairs (lillama, GFWSVD)",
        pairs=(PairRule("{module}.0.weight", "{module}.1.weight"),),
        rank_map="ranks",
        names="hint",
    ),
    Family("fwsvd", "FWSVD", pairs=(PairRule("{module}.lin0.weight", "{module}.lin1.weight"),), names="hint"),
    Family(
        "dynrank",
        "first/second pairs",
        pairs=(PairRule("{module}.first.weight", "{module}.second.weight"),),
        names="hint",
    ),
    Family(
        "flashsvd_encoder",
        "FlashSVD's BERT and RoBERTa states, factors of single heads",
        pairs=(PairRule(FIRST, SECOND),),
        key_pattern=r"(?:^|\.)(?:Pq|Uo|U1)$",
        view=HeadFactorSource,
    ),
    Family(
        "flashsvd_gpt2",
        "FlashSVD's GPT-2 blocks, factors of single heads",
        pairs=(PairRule(FIRST, SECOND),),
        key_pattern=r"(?:^|\.)(?:q_U|fc1_U)$",
        view=Gpt2Blocks,
    ),
    Family(
        "mla",
        "DeepSeek multi-head latent attention",
        key_pattern=r"\.kv_a_proj_with_mqa\.",
        refusal="there is a norm between its factors",
    ),
    Family("lora", "PEFT's LoRA adapters, merged into a base of any family", files=(ADAPTER_CONFIG,)),
    Family(
        "lora_whole",
        "a PEFT model's whole state dict",
        key_pattern=r"\.lora_(?:embedding_)?[AB](?:\.|$)",
        refusal="save the adapter by itself and convert that, with --base for its base model, or merge it with PEFT",
    ),
    Family(
        "corda",
        "CorDA, a residual of full size beside its factors",
        key_pattern=r"\.weight_residual$",
        architectures=("CovSVD",),
        added_keys=("lora_r",),
        view=DenseResiduals,
    ),
    Family(
        "bare_ab",
        "ALinear/BLinear pairs of no named family (QSVD, ASVD and Dobi-SVD pickles)",
        pairs=(_A_AFTER_B,),
        names="none",
        view=SharedFirsts,
    ),
    Family("dense", "an uncompressed model, or one merged back to dense"),
)

# Methods of which no form of their own is public, and how their models are read where they are stored in another's.
WITHOUT_FORM = (
    ("AdaSVD", "`compress --method svdllm --alloc importance` makes it; builds on SVD-LLM: `svdllm`"),
    (
        "Adaptive Rank Selection",
        "`compress --alloc learned` chooses ranks in its place; as any pair of factors, `sequential` or `aa_svd`",
    ),
    ("DRONE", "`compress --method drone` makes it; a re-implementation multiplies back: `dense`"),
    (
        "D-Rank",
        "`compress --method basis_sharing --alloc effective` makes it; Basis Sharing with a rank for each group: `basis_sharing`",
    ),
    ("GF-SVD", "neither form nor code is public, and what its paper tells openly does not suffice to make it"),
    ("SAES-SVD", "`compress --method saes` makes it; LowRankArena has reproduced it: `lowrankarena`"),
    (
        "SoLA",
        "neither read nor made: neurons that it keeps dense would each take a further rank of the pair beside them",
    ),
    ("SVD-LLM v2", "re-implemented with SVD-LLM's names and a rank for each projection: `svdllm`, `lowrankarena`"),
)


def family_named(name: str) -> Family:
    """The family of a name in the table."""
    return next(family for family in FAMILIES if family.name == name)
