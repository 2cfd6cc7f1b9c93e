"""Loads a model's configuration and checks that it describes a causal decoder with plain weights."""

from __future__ import annotations

from typing import Any

from xprobe.errors import ModelError
from xprobe.models.checkpoint import check_plain
from xprobe.models.loading_errors import explain_error
from xprobe.models.messages import quiet
from xprobe.models.sources import Source, location_and_options

# configuration entries of models that read images or sound besides text
_WITH_TEXT = ("vision_config", "audio_config", "vision_tower_config", "vit_config", "visual")


WINDOW_NAMES = (  # that families give to the longest input
    "max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length",
    "max_target_positions",
)  # fmt: skip


def load_config(source: Source, trust_remote_code: bool = False, warnings: list[str] | None = None) -> Any:
    """Loads the configuration of a model and checks that it is a causal decoder with plain weights.

    Parameters
    ----------
    source : Source
        From ``resolve``.
    trust_remote_code : bool
        Whether the configuration may run code of its own.
    warnings : list of str, optional
        The function appends the warnings of transformers.

    Raises
    ------
    ModelError
        The configuration cannot be read, or the model is not a causal decoder, or it is quantised.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from xprobe.models.sources import resolve
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LlamaConfig(hidden_size=32, num_attention_heads=4).save_pretrained(folder)
    ...     load_config(resolve(folder)).hidden_size
    32
    """
    import transformers

    location, options = location_and_options(source, trust_remote_code)
    with quiet(warnings):
        try:
            model_config = transformers.AutoConfig.from_pretrained(location, **options)
        except Exception as error:  # as in load
            raise ModelError(explain_error(source, error)) from error
    check_decoder(model_config, source.name)
    check_plain(model_config, source.name)
    return with_default_attention(model_config, warnings)


def with_default_attention(model_config: Any, warnings: list[str] | None = None) -> Any:
    """Replaces an attention kernel of another package (flash attention) by transformers' default.

    The kernel is not a property of the weights, and kernels of other packages have no float32.
    """
    implementation = getattr(model_config, "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        model_config._attn_implementation = None
        if warnings is not None:
            warnings.append(
                f"config.json asks for the attention {implementation!r}: transformers' default is used in its place"
            )
    return model_config


def window(config: Any) -> int | None:
    """Longest input in tokens, from the configuration. None if the model has no limit (as with ALiBi).

    A configuration may carry an entry that its family does not read, so the smallest of them counts.

    Examples
    --------
    >>> from transformers import BloomConfig, LlamaConfig
    >>> window(LlamaConfig(max_position_embeddings=2048))
    2048
    >>> window(BloomConfig()) is None
    True
    """
    text = config.get_text_config(decoder=True)
    values = [getattr(text, name, None) for name in WINDOW_NAMES]
    if getattr(config, "auto_map", None):  # in others it is the length in training, which ALiBi may exceed
        values.append(getattr(text, "seq_length", None))
    return min((value for value in values if type(value) is int and value > 0), default=None)


def check_decoder(config: Any, name: str) -> None:
    """Refuses configurations of models that are not causal decoders.

    Raises
    ------
    ModelError
        Names the architecture.

    Examples
    --------
    >>> from transformers import LlamaConfig, T5Config
    >>> check_decoder(LlamaConfig(), "my-model")
    >>> check_decoder(T5Config(), "my-model")
    Traceback (most recent call last):
    ...
    xprobe.errors.ModelError: my-model is an encoder-decoder (t5): xprobe reads decoder-only models
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}): xprobe reads decoder-only models")
    listed = getattr(config, "architectures", None)
    architectures = [str(entry) for entry in listed] if isinstance(listed, list) else []
    if not _is_causal(config) and any(getattr(config, part, None) is not None for part in _WITH_TEXT):
        raise ModelError(
            f"{name} reads images or sound besides text ({config.model_type}): xprobe cannot read its text decoder "
            "yet. If the text decoder is published as a separate model, use that"
        )
    model_code_errors = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not _is_causal(config) or not (model_code_errors or not architectures or any(map(_predicts, architectures))):
        raise ModelError(
            f"{name} is not a causal decoder ({', '.join(architectures) or config.model_type}): "
            "xprobe reads models that predict the next token"
        )


def _is_causal(config: Any) -> bool:
    """Whether transformers or the model's own code has a causal language model for ``config``."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_code_errors = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return model_code_errors or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _predicts(architecture: str) -> bool:
    """Whether a class predicts the next token, judged by its name and by the lists of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return architecture.endswith(heads) or architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
