"""MaMMUT against a plain transcription in float64, and against a model put together from open_clip's blocks."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize

from contracap.generation import BeamSearch, Captioner, Greedy, Sampling
from contracap.generation.word_maps import attention_map
from contracap.images import ImageConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import load, processor_for, read_weights, save_open_clip
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.fit import match_sizes
from contracap.pretrained.open_clip_config import config_from_open_clip, config_to_open_clip
from contracap.pretrained.open_clip_names import from_open_clip, to_open_clip
from contracap.pretrained.shapes import meta_state, shapes_of

from .tiny_models import relative

CONTEXT, VOCABULARY = 16, 1024
TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": 64,
    "heads": 2,
    "layers": 4,
    "cross_attn_ratio": 2,
}
VISION = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "pool_type": "avg_all", "output_tokens": True}
VISION |= {"final_ln_after_pool": True}
FORK = {
    "embed_dim": 64,
    "vision_cfg": VISION,
    "text_cfg": TEXT | {"output_tokens": True, "does_full_decoding": True},
    "custom_text": True,
}
SMALL = FORK | {"text_cfg": FORK["text_cfg"] | {"has_mlp": False}}
OPEN_CLIP_4_2 = {"embed_dim": 64, "vision_cfg": VISION | {"pool_type": "avg"}, "multimodal_cfg": TEXT}
DIALECTS = {"fork": FORK, "fork, small": SMALL, "open_clip 4.2": OPEN_CLIP_4_2}
State = Mapping[str, Tensor]


def random_state(config: CoCaConfig) -> dict[str, Tensor]:
    """Tensors of open_clip's layout, of which none is zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(to_open_clip(meta_state(config), config))
    return {
        name: (name.endswith("weight") and len(shape) == 1) + torch.randn(shape, generator=generator) * 0.05
        for name, shape in shapes.items()
    }


def build(config: CoCaConfig, state: State) -> CoCa:
    model = CoCa(config).eval()
    model.load_state_dict(from_open_clip(state, config))
    return model


def texts(*lengths: int) -> Tensor:
    ids = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(length) + 7 * (row + 1)
        ids[row, 0], ids[row, length - 1] = VOCABULARY - 2, VOCABULARY - 1
    return ids


# --- the transcription ------------------------------------------------------------------------------------------------


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attention(
    state: State, name: str, queries: Tensor, memory: Tensor, heads: int, seen: Tensor | None = None
) -> Tensor:
    weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    query, key, value = (
        (rows @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for rows, weight, bias in zip((queries, memory, memory), weights, biases, strict=True)
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    if f"{name}.ln_2.weight" not in state:
        return x
    hidden = gelu(norm(state, f"{name}.ln_2", x) @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"])
    return x + hidden @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def block(state: State, name: str, x: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    inner = norm(state, f"{name}.ln_1", x)
    return feed_forward(state, name, x + attention(state, f"{name}.attn", inner, inner, heads, seen))


def cross_block(state: State, name: str, x: Tensor, memory: Tensor, heads: int) -> Tensor:
    queries, keys = norm(state, f"{name}.ln_1", x), norm(state, f"{name}.ln_1_kv", memory)
    return feed_forward(state, name, x + attention(state, f"{name}.attn", queries, keys, heads))


def transcription(config: Mapping[str, Any], state: State, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    state, pixels = {name: tensor.double() for name, tensor in state.items()}, pixels.double()
    vision, text = config["vision_cfg"], config.get("text_cfg") or config["multimodal_cfg"]
    is_fork = "text_cfg" in config
    patches = nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"])
    tokens = torch.cat(
        [state["visual.class_embedding"].expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1
    )
    tokens = norm(state, "visual.ln_pre", tokens + state["visual.positional_embedding"])
    for layer in range(vision["layers"]):
        heads = vision["width"] // vision.get("head_width", 64)
        tokens = block(state, f"visual.transformer.resblocks.{layer}", tokens, heads)
    tokens = tokens if vision["pool_type"] == "avg_all" else tokens[:, 1:]
    image = norm(state, "visual.ln_post", tokens.mean(1)) @ state["visual.proj"]
    memory = tokens @ state["map_viz2txt_kv"]

    def embed(ids: Tensor) -> Tensor:
        return state["text.token_embedding.weight"][ids] + state["text.positional_embedding"][: ids.shape[1]]

    is_token = ids != 0
    x = embed(ids)
    for layer in range(text["layers"]):
        seen = None if is_fork else is_token[:, None, None, :]
        x = block(state, f"text.resblocks.{layer}", x, text["heads"], seen)
    x = norm(state, "text.ln_final", x)
    counted = torch.ones_like(is_token) if is_fork else is_token
    embedding = (x * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)

    x = embed(ids[:, :-1])
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for layer in range(text["layers"]):
        x = block(state, f"text.resblocks.{layer}", x, text["heads"], causal)
        if layer % text["cross_attn_ratio"] == 0:
            x = cross_block(state, f"text.cross_attn.{layer // text['cross_attn_ratio']}", x, memory, text["heads"])
    head = state["text.text_projection" if is_fork else "text.lm_head"]
    logits = norm(state, "text.ln_final", x) @ head
    return {"image": normalize(image, dim=-1), "text": normalize(embedding, dim=-1), "logits": logits}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_features_and_logits_equal_a_transcription(dialect: str) -> None:
    theirs = DIALECTS[dialect]
    config = config_from_open_clip(theirs)
    state, pixels, ids = random_state(config), torch.randn(3, 3, 32, 32), texts(2, 7, CONTEXT)
    wanted = transcription(theirs, state, pixels, ids)
    with torch.no_grad():
        output = build(config, state)(pixels, ids)
    assert relative(output.image_features, wanted["image"]) < 1e-5
    assert relative(output.text_features, wanted["text"]) < 1e-5
    for row, length in enumerate((2, 7, CONTEXT)):
        assert relative(output.logits[row, : length - 1], wanted["logits"][row, : length - 1]) < 1e-5


# --- open_clip's blocks -----------------------------------------------------------------------------------------------


class Peer(nn.Module):
    """A MaMMUT of open_clip's public modules."""

    def __init__(self, open_clip: ModuleType, config: Mapping[str, Any]):
        super().__init__()
        block = open_clip.transformer.ResidualAttentionBlock
        vision, text = dict(config["vision_cfg"]), config["text_cfg"]
        self.text_config = text
        arguments = {name: vision[name] for name in ("image_size", "patch_size", "width", "layers")}
        self.visual = open_clip.transformer.VisionTransformer(
            **arguments,
            heads=vision["width"] // vision.get("head_width", 64),
            mlp_ratio=4.0,
            output_dim=config["embed_dim"],
            pool_type="none",
            final_ln_after_pool=True,
        )
        self.text = nn.Module()
        width, heads, layers = text["width"], text["heads"], range(text["layers"])
        self.text.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.text.positional_embedding = nn.Parameter(torch.empty(text["context_length"], width))
        self.text.resblocks = nn.ModuleList(block(width, heads) for _ in layers)
        self.text.cross_attn = nn.ModuleList(
            block(width, heads, is_cross_attention=True) for layer in layers if layer % text["cross_attn_ratio"] == 0
        )
        for layer in layers:
            if not text.get("has_mlp", True) and layer % text["cross_attn_ratio"] == 0:
                del self.text.resblocks[layer].mlp, self.text.resblocks[layer].ln_2
        self.text.ln_final = open_clip.transformer.LayerNorm(width)
        self.text.text_projection = nn.Parameter(torch.empty(width, text["vocab_size"]))
        self.map_viz2txt_kv = nn.Parameter(torch.empty(vision["width"], width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def run_block(self, block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if hasattr(block, "mlp"):
            return block(x, attn_mask=mask)
        return x + block.attention(block.ln_1(x), attn_mask=mask)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        visual, text = self.visual, self.text
        proj, post, visual.proj, visual.ln_post = visual.proj, visual.ln_post, None, nn.Identity()
        tokens = visual(pixels)
        visual.proj, visual.ln_post = proj, post
        x = text.token_embedding(ids) + text.positional_embedding
        for block in text.resblocks:
            x = self.run_block(block, x)
        embedding = text.ln_final(x).mean(1)
        x, ratio = text.token_embedding(ids[:, :-1]), self.text_config["cross_attn_ratio"]
        x = x + text.positional_embedding[:-1]
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        memory = tokens @ self.map_viz2txt_kv
        for layer, block in enumerate(text.resblocks):
            x = self.run_block(block, x, mask)
            if layer % ratio == 0:
                x = text.cross_attn[layer // ratio](x, k_x=memory, v_x=memory)
        return post(tokens.mean(1)) @ proj, embedding, text.ln_final(x) @ text.text_projection


@pytest.mark.parametrize("name", ["L-14", "B-16", "S-32"])
def test_features_and_logits_equal_open_clips_blocks_at_released_widths(open_clip, name: str) -> None:
    theirs = config_to_open_clip(SIZES[f"mammut_ViT-{name}"])
    image_size = 4 * theirs["vision_cfg"]["patch_size"]
    theirs["vision_cfg"] |= {"layers": 2, "image_size": image_size}
    theirs["text_cfg"] |= {"layers": 2, "vocab_size": VOCABULARY}
    config = config_from_open_clip(theirs)
    state = random_state(config)
    with torch.device("meta"):
        peer = Peer(open_clip, theirs).eval()
    peer.load_state_dict(state, assign=True)
    pixels = torch.randn(2, 3, image_size, image_size)
    ids = torch.nn.functional.pad(texts(3, 9), (0, 77 - CONTEXT))
    with torch.no_grad():
        image, text, logits = peer(pixels, ids)
        output = build(config, state)(pixels, ids)
    assert relative(output.image_features, normalize(image, dim=-1)) < 1e-5
    assert relative(output.text_features, normalize(text, dim=-1)) < 1e-5
    assert relative(output.logits[1, :8], logits[1, :8]) < 1e-5


# --- facts of our own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_text_has_the_same_embedding_and_logits_at_any_padded_length(dialect: str) -> None:
    config = config_from_open_clip(DIALECTS[dialect])
    model, ids, pixels = build(config, random_state(config)).double(), texts(2, 7, CONTEXT), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = model(pixels.double(), ids), model(pixels[1:2].double(), ids[1:2, :7])
        assert torch.allclose(alone.text_features, together.text_features[1:2])
        assert torch.allclose(alone.logits[0, :6], together.logits[1, :6])
        assert torch.allclose(model.encode_text(ids), together.text_features)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_cached_decoding_equals_the_full_forward(dialect: str) -> None:
    config = config_from_open_clip(DIALECTS[dialect])
    model = build(config, random_state(config)).double()
    ids, pixels = texts(CONTEXT, CONTEXT), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        full = model(pixels.double(), ids).logits
        _, caption_tokens = model.encode_caption_tokens(pixels.double())
        projected = model.require_decoder().project(caption_tokens)
        cache = model.new_cache(projected, prompt=3, num_texts=1, max_tokens=CONTEXT)
        logits = [model.prefill(ids[:, :3], cache)]
        logits += [model.decode(ids[:, column, None], cache) for column in range(3, CONTEXT - 1)]
    assert relative(torch.cat(logits, dim=1).double(), full[:, 2:]) < 1e-6


def test_every_strategy_captions_and_words_have_maps() -> None:
    config = config_from_open_clip(SMALL)
    model = build(config, random_state(config))
    processor = processor_for(config, ImageConfig(size=32))
    captioner, image = Captioner(model, processor), Image.new("RGB", (40, 30), "red")
    for strategy in (Greedy(max_tokens=8), BeamSearch(width=3, max_tokens=8), Sampling(seed=0, max_tokens=8)):
        assert len(captioner([image], strategy)[0].token_ids) <= 7
    maps = attention_map(model, processor.images([image]), [5, 6, 7])
    assert maps.shape == (3, 4, 4) and torch.allclose(maps.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_folder_in_its_dialect_and_back_is_bit_equal(dialect: str, tmp_path: Path) -> None:
    theirs = DIALECTS[dialect]
    config = config_from_open_clip(theirs)
    state = random_state(config)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": theirs}))
    found = read_weights(tmp_path)
    assert found.model == config and config_from_open_clip(config_to_open_clip(config)) == config
    save_open_clip(tmp_path / "again", model=found.model, image=found.image, state=found.state)
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert read_weights(tmp_path / "again").model == config
    (tmp_path / "open_clip_config.json").write_text(json.dumps(theirs))  # flat
    assert load(tmp_path)[0].config == config


def test_openmammut_as_open_clip_4_2_writes_it_loads(tmp_path: Path) -> None:
    config = config_from_open_clip(FORK)
    state = random_state(config)
    renamed = {name.replace("text.text_projection", "text.lm_head"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "open_clip_model.safetensors")
    legacy = TEXT | {"pool_type": "avg_all", "use_pad_mask": False, "proj_type": "none"}
    theirs = {"embed_dim": 64, "vision_cfg": VISION, "multimodal_cfg": legacy}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": theirs}))
    found = read_weights(tmp_path)
    assert found.model == config
    assert torch.equal(found.state["decoder.vocabulary.weight"].T, state["text.text_projection"])


def test_a_bare_training_checkpoint_loads_and_what_cannot_be_told_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    config = config_from_open_clip(SMALL)
    monkeypatch.setitem(SIZES, "small", config)
    state = random_state(config)
    checkpoint = {"state_dict": {f"module._orig_mod.{name}": tensor.half() for name, tensor in state.items()}}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    assert load(tmp_path / "epoch_3.pt")[0].config == config
    state["text.lm_head"] = state.pop("text.text_projection")
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(WeightsError, match="padding counts in its mean"):
        load(tmp_path / "bare.pt", size="small")


@pytest.mark.parametrize("name", ["S-32", "L-14"])
def test_a_bare_file_of_a_size_is_recognised(name: str) -> None:
    config = SIZES[f"mammut_ViT-{name}"]
    assert match_sizes(shapes_of(to_open_clip(meta_state(config), config))) == [f"mammut_ViT-{name}"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("multimodal_cfg", "proj_type", "linear"), ("multimodal_cfg", "use_pad_mask", False)),
        *(("multimodal_cfg", "text_arch", "modern"), ("multimodal_cfg", "pad_id", 1)),
        *(("text_cfg", "does_full_decoding", False), ("text_cfg", "embed_cls", True)),
        *(("text_cfg", "a_key_of_next_year", 1), ("vision_cfg", "pool_type", "tok")),
        ("vision_cfg", "attentional_pool", True),
    ],
)
def test_what_could_change_a_result_and_is_not_understood_is_refused_by_name(section: str, key: str, value) -> None:
    theirs = OPEN_CLIP_4_2 if section == "multimodal_cfg" else FORK
    with pytest.raises(WeightsError, match=key):
        config_from_open_clip(theirs | {section: theirs[section] | {key: value}})


@pytest.mark.parametrize(
    ("name", "millions"), [("S-32", 85.62), ("M-32", 134.73), ("B-32", 183.02), ("L-14", 508.29), ("H-14", 1188.14)]
)
def test_sizes_have_their_published_parameter_counts(name: str, millions: float) -> None:
    state = meta_state(SIZES[f"mammut_ViT-{name}"])
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parts_of_other_families_are_refused() -> None:
    config = config_from_open_clip(FORK)
    for wrong in ({"decoder": None}, {"pooler": SIZES["tiny"].pooler}, {"text": SIZES["tiny"].text}):
        with pytest.raises(ValueError, match="a MaMMUT has a mean"):
            replace(config, **wrong)
    with pytest.raises(ValueError, match=r"decoder\.layers 2 must equal text\.layers 4"):
        replace(config, decoder=replace(config.decoder, layers=2))
