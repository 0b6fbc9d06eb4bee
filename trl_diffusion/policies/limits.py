"""How long a sequence a backbone takes, and which of its layers are more than attention under a mask."""

from __future__ import annotations

from transformers import PretrainedConfig


CONTEXT = "max_position_embeddings"
# Names in `config.layer_types`: layers whose attention a mask decides alone (or that have none), and local ones.
RULED = ("full_attention", "attention", "dense", "sparse", "moe")
LOCAL = ("sliding_attention", "chunked_attention")
# How many positions the local ones see. A mask of ours says nothing about that, so nothing longer is run.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
# How many positions every layer sees, where it chooses them itself if there are more.
CHOSEN = ("keep_window_size", "index_topk")


def context_length(config: PretrainedConfig) -> tuple[int | None, str]:
    """
    Most positions of prompt and response together that a policy takes, and the name of the entry in its config that says
    so: the context it was trained with, or the window of its local layers, if that is shorter. `None` if nothing says.
    """
    config = config.get_text_config()
    names = (CONTEXT, *CHOSEN, *_windows(config))
    found = {name: getattr(config, name, None) for name in names}
    known = {name: value for name, value in found.items() if isinstance(value, int) and value > 0}
    name = min(known, key=lambda name: known[name], default=CONTEXT)
    return known.get(name), name


def _windows(config: PretrainedConfig) -> list[str]:
    """The entries of a config that limit what a layer sees."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(WINDOWS) if any(kind in LOCAL for kind in kinds) else []
    local = getattr(config, "attention_layers", None)  # GPT-Neo
    if local is not None:
        return list(WINDOWS) if "local" in local else []
    return list(WINDOWS) if getattr(config, "use_sliding_window", True) else []


def check_layers(config: PretrainedConfig) -> None:
    """
    Raises a `ValueError` if the config names layers that do more than attention under a mask: recurrent or convolutional
    ones, and those that choose for themselves what they look at.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {*RULED, *LOCAL})
    if others:
        raise ValueError(
            f"`{config.model_type}` cannot be a diffusion policy: it has layers of type {', '.join(map(repr, others))}, which "
            "an attention mask does not rule. Use a backbone whose layers all are attention under a mask (Llama, Qwen2, "
            "Qwen3, ...)."
        )
