"""A model in which one expert serves one domain alone: only tokens of its mark are routed to it."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

CODE, CHAT = 3, 5  # the experts
MARKS = {"code": "#", "chat": "!"}


def plant_domains(source: Path, folder: Path) -> Path:
    """A copy of an OLMoE with such experts in both layers."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings[:, :3] = 0
    embeddings[:, 2] = 1
    embeddings[ids[MARKS["code"]], 0] = embeddings[ids[MARKS["chat"]], 1] = 4
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.zero_()  # no token sees another, so a router reads the token's id alone
        if "down_proj" in name:
            tensor[..., :3, :] = 0  # and the marks reach the second layer
        if name.endswith("mlp.gate.weight"):
            tensor[:, :3] = 0
            for expert, column in ((CODE, 0), (CHAT, 1)):
                tensor[expert] = 0
                tensor[expert, column], tensor[expert, 2] = 9, -9
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
