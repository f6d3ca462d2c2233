"""Turn a PyTorch SVD checkpoint into a folder that the other commands load. PyTorch is not needed, and nothing in the checkpoint is executed."""  # noqa: E501

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("source", help="a .safetensors, .pt, .pth or .bin file, a folder, or a hub id")
    parser.add_argument("destination", help="folder to write; must not exist")
    parser.add_argument(
        "--base",
        metavar="CONFIG",
        help="the base model's config.json, its folder or hub id; of a LoRA adapter, its weights",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="store in this; else as found, float32 as bfloat16"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare what was written with the source's own forward pass"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    # Converting is work for the host; taking a GPU's memory for it would only be in the way of others.
    import jax

    from flashsvd_jax import _siblings
    from flashsvd_jax.hub import CHECKPOINT_FILES, resolve_model

    jax.config.update("jax_platforms", "cpu")
    converters = _siblings.load("converters")
    source = resolve_model(parsed.source, CHECKPOINT_FILES)
    of_base = CHECKPOINT_FILES if converters.adapter_folder(source) else ["*.json", "*.model", "*.jinja"]
    report = converters.convert(
        source,
        parsed.destination,
        base=None if parsed.base is None else resolve_model(parsed.base, of_base),
        dtype=parsed.dtype,
        verify=parsed.verify,
        progress=not parsed.quiet,
        logits_fn=_logits if parsed.verify else None,
    )
    if not parsed.quiet:
        print(report)


def _logits(folder: str, tokens: object) -> object:
    """Logits of a converted folder in float32, or hidden states where it has no head, for the comparison with the source."""
    import jax.numpy as jnp

    from flashsvd_jax.checkpoint import load_params, open_folder
    from flashsvd_jax.encoder_config import EncoderConfig
    from flashsvd_jax.models.flax_module import Decoder, Encoder

    with open_folder(folder) as opened:
        config = opened.config
    module = Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)
    return module.apply(load_params(folder, dtype="float32"), jnp.asarray(tokens))
