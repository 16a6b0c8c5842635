"""A LoRA is the same in every layout: W + alpha / rank B A, whoever wrote the file; nothing is dropped."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffopd.adapters import adapter_parameters
from diffopd.dialects import match, read_layers, read_lora, without_text_encoder
from diffopd.errors import UserError
from diffopd.load import fuse_adapter, load_lora, load_pipeline

RANK, ALPHA = 2, 5.0
TARGETS = (
    "to_q",
    "to_out.0",
    "ff.net.0.proj",
    "proj_in",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
)


def random_layers(denoiser, targets=TARGETS, ranks=(RANK,)):
    """Module -> (A, B) for every linear layer and convolution of the denoiser whose name ends in a target."""
    generator, layers = torch.Generator().manual_seed(7), {}
    for name, module in denoiser.named_modules():
        weight = getattr(module, "weight", None)
        if not name.endswith(targets) or weight is None or weight.ndim not in (2, 4):
            continue
        rank = ranks[len(layers) % len(ranks)]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.1
        layers[name] = (down, up)
    assert layers
    return layers


def fused_by_hand(denoiser, layers, scales):
    """The denoiser's weights with W + scale B A."""
    weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
    for name, (down, up) in layers.items():
        delta = (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        weights[f"{name}.weight"] += scales[name] * delta
    return weights


def written(path, layers, spell, endings, alpha=None):
    """The layers in a file, their names spelled by `spell`; alpha: per layer, as a tensor beside it."""
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {spell(name) + endings[0]: down, spell(name) + endings[1]: up}
        if alpha is not None:
            tensors[f"{spell(name)}.alpha"] = torch.tensor(alpha(name))
    save_file(tensors, path)
    return path


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
LAYOUTS = {
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), KOHYA),
    "comfyui, A and B": (lambda name: f"diffusion_model.{name}", PEFT),
    "comfyui, down and up": (lambda name: f"diffusion_model.{name}", KOHYA),
    "diffusers with alphas": (lambda name: f"unet.{name}", PEFT),
}


def loaded_weights(base, file):
    pipeline = load_pipeline(str(base))
    load_lora(pipeline, str(file), "teacher")
    fuse_adapter(pipeline)
    return pipeline.unet.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_alpha", [True, False])
def test_every_layout_is_the_same_weights_by_hand_with_alpha_over_rank(tiny_sd, tmp_path, layout, with_alpha):
    unet = load_pipeline(str(tiny_sd)).unet
    layers = random_layers(unet)
    spell, endings = LAYOUTS[layout]
    file = written(tmp_path / "l.safetensors", layers, spell, endings, (lambda name: ALPHA) if with_alpha else None)
    scale = ALPHA / RANK if with_alpha else 1.0
    assert_same(loaded_weights(tiny_sd, file), fused_by_hand(unet, layers, dict.fromkeys(layers, scale)))


def test_alpha_and_rank_may_differ_from_layer_to_layer(tiny_sd, tmp_path):
    """sd-scripts gives convolutions an alpha and a rank of their own; diffusers' loader takes one alpha for all."""
    unet = load_pipeline(str(tiny_sd)).unet
    layers = random_layers(unet, ranks=(1, 2, 3))

    def alpha(name):
        return 1.0 if "conv" in name else 4.0

    file = written(tmp_path / "l.safetensors", layers, *LAYOUTS["kohya"], alpha)
    scales = {name: alpha(name) / len(down) for name, (down, _) in layers.items()}
    assert_same(loaded_weights(tiny_sd, file), fused_by_hand(unet, layers, scales))


def peft_folder(folder, layers, **config):
    from peft import LoraConfig

    folder.mkdir()
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(layers), **config).save_pretrained(folder)
    return written(folder / "adapter_model.safetensors", layers, lambda name: f"base_model.model.{name}", PEFT)


@pytest.mark.parametrize(("config", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)])
def test_pefts_layout_has_its_alpha_from_the_config_beside_it(tiny_sd, tmp_path, config, scale):
    unet = load_pipeline(str(tiny_sd)).unet
    layers = random_layers(unet)
    file = peft_folder(tmp_path / "peft", layers, **config)
    assert_same(loaded_weights(tiny_sd, file), fused_by_hand(unet, layers, dict.fromkeys(layers, scale)))
    file.with_name("adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json, and there is none"):
        loaded_weights(tiny_sd, file)


def with_header(file, layers, **config):
    """The layers as diffusers saves them, with a LoraConfig in the file's header."""
    from peft import LoraConfig

    said = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(layers), **config).to_dict()
    said = {f"unet.{key}": list(value) if isinstance(value, set) else value for key, value in said.items()}
    written(file, layers, lambda name: f"unet.{name}", PEFT)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(said)})
    return file


def saved(place, layers, form, **config):
    if form == "peft":
        return peft_folder(place / "peft", layers, **config)
    return with_header(place / "l.safetensors", layers, **config)


@pytest.mark.parametrize("form", ["peft", "header"])
@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica"])
def test_however_a_lora_began_no_tensor_of_the_base_changes_when_it_is_loaded(tiny_sd, tmp_path, form, init):
    pipeline = load_pipeline(str(tiny_sd))
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    layers = random_layers(pipeline.unet, ("to_q", "ff.net.0.proj"))
    load_lora(pipeline, str(saved(tmp_path, layers, form, init_lora_weights=init)), "teacher")
    found = {name.replace(".base_layer", ""): value for name, value in pipeline.unet.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in before.items())
    fuse_adapter(pipeline)
    deltas = {f"{name}.weight": ALPHA / RANK * up @ down for name, (down, up) in layers.items()}
    assert_same(pipeline.unet.state_dict(), before | {name: before[name] + deltas[name] for name in deltas})


@pytest.mark.parametrize("form", ["peft", "header"])
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        *(
            ({"init_lora_weights": init}, f"has init_lora_weights = '{init}'")
            for init in ("pissa", "pissa_niter_4", "OLoRA", "corda", "lora_ga", "loftq", "of tomorrow")
        ),
        ({"use_dora": True}, "is not a plain LoRA, it has use_dora"),
        ({"kasa_config": {"beta": 1e-4}}, "is not a plain LoRA, it has kasa_config"),
        ({"modules_to_save": ["conv_in"]}, "is not a plain LoRA, it has modules_to_save"),
    ],
)
def test_a_lora_of_a_base_that_peft_rewrote_or_of_more_than_two_matrices_is_refused(tmp_path, form, said, reason):
    file = saved(tmp_path, {"to_q": (torch.ones(RANK, 4), torch.ones(4, RANK))}, form)
    named = file
    if form == "peft":
        named = file.with_name("adapter_config.json")
        named.write_text(json.dumps(json.loads(named.read_text()) | said))
    else:
        with safe_open(file, "pt") as opened:
            before = json.loads(opened.metadata()["lora_adapter_metadata"])
        config = before | {f"unet.{key}": value for key, value in said.items()}
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(UserError, match=f"{named}: {reason}"):
        read_layers(file)


def test_a_file_that_peft_itself_saved_is_read(tiny_sd, tmp_path):
    from peft import LoraConfig, get_peft_model

    unet = load_pipeline(str(tiny_sd)).unet
    model = get_peft_model(
        unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "peft")
    expected = {key: value.clone() for key, value in model.merge_and_unload().state_dict().items()}
    assert_same(loaded_weights(tiny_sd, tmp_path / "peft" / "adapter_model.safetensors"), expected)


def test_half_precision_files_are_widened_to_the_networks_own(tiny_sd, tmp_path):
    pipeline = load_pipeline(str(tiny_sd))
    layers = {name: (a.half(), b.half()) for name, (a, b) in random_layers(pipeline.unet).items()}
    file = written(tmp_path / "l.safetensors", layers, *LAYOUTS["comfyui, A and B"])
    load_lora(pipeline, str(file), "teacher")
    assert {p.dtype for p in adapter_parameters(pipeline.unet, "teacher").values()} == {torch.float32}


@pytest.mark.parametrize("key", ["lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.layers.0.mlp.fc1"])
def test_tensors_of_the_text_encoder_are_an_error_that_says_how_to_leave_them_out(tiny_sd, tmp_path, key):
    unet = load_pipeline(str(tiny_sd)).unet
    layers = random_layers(unet)
    spell, endings = LAYOUTS["kohya"]
    file = written(tmp_path / "l.safetensors", layers, spell, endings)
    other = {key + endings[0]: torch.zeros(2, 16), key + endings[1]: torch.zeros(16, 2)}
    save_file(load_file(file) | other, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="2 of its .* tensors change the text encoder"):
        loaded_weights(tiny_sd, tmp_path / "both.safetensors")
    without_text_encoder(tmp_path / "both.safetensors", tmp_path / "one.safetensors")
    assert_same(loaded_weights(tiny_sd, tmp_path / "one.safetensors"), loaded_weights(tiny_sd, file))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            {"lora_unet_nowhere_to_q.lora_down.weight": 1, "lora_unet_nowhere_to_q.lora_up.weight": 1},
            "1 of its .* layers",
        ),
        ({"lora_unet_conv_in.lora_down.weight": 1}, "no part of a LoRA layer"),
        ({"lora_unet_conv_in.diff": 1}, "no part of a LoRA layer"),
        ({"lora_unet_conv_in.alpha": 1}, "an .alpha of lora_unet_conv_in"),
        ({"lora_unet_conv_in.dora_scale": 1}, "is DoRA"),
        ({"lora_unet_conv_in.lokr_w1": 1}, "is LoKr"),
        ({"lora_unet_conv_in.hada_w1_a": 1}, "is LoHa"),
        ({"lora_unet_conv_in.lora_mid.weight": 1}, "Tucker"),
    ],
)
def test_what_would_be_left_out_is_refused(tiny_sd, tmp_path, extra, reason):
    layers = random_layers(load_pipeline(str(tiny_sd)).unet)
    file = written(tmp_path / "l.safetensors", layers, *LAYOUTS["kohya"])
    save_file(load_file(file) | {key: torch.ones(1, 1) for key in extra}, file)
    with pytest.raises(UserError, match=reason):
        loaded_weights(tiny_sd, file)


def test_an_empty_file_and_one_that_is_no_safetensors_are_refused(tiny_sd, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="no tensors"):
        loaded_weights(tiny_sd, tmp_path / "empty.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not at all")
    with pytest.raises(UserError, match="not a safetensors file"):
        loaded_weights(tiny_sd, tmp_path / "broken.safetensors")


def test_another_adapter_on_the_network_does_not_change_how_names_are_read(tiny_sd, tmp_path):
    pipeline = load_pipeline(str(tiny_sd))
    layers = random_layers(pipeline.unet)
    file = written(tmp_path / "l.safetensors", layers, *LAYOUTS["kohya"], lambda name: ALPHA)
    load_lora(pipeline, str(file), "first")
    assert read_lora(file, pipeline).layers.keys() == layers.keys()
    load_lora(pipeline, str(file), "second")
    first, second = (adapter_parameters(pipeline.unet, name).values() for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def tiny_flux():
    """A FLUX.1 pipeline of which only the transformer is there."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer.eval(), **parts)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"transformer.{name}",
        lambda name: f"diffusion_model.{name}",
        lambda name: "lora_transformer_" + name.replace(".", "_"),
    ],
)
def test_transformers_are_read_under_their_own_names(tiny_flux, tmp_path, spell):
    layers = random_layers(tiny_flux.transformer, ("attn.to_q", "attn.to_out.0", "proj_mlp"))
    file = written(tmp_path / "l.safetensors", layers, spell, KOHYA, lambda name: ALPHA)
    found = read_lora(file, tiny_flux).layers
    assert found.keys() == layers.keys()
    assert {layer.scale for layer in found.values()} == {ALPHA / RANK}


@pytest.mark.parametrize(
    "spell", [lambda name: "lora_unet_" + name.replace(".", "_"), lambda name: f"diffusion_model.{name}"]
)
@pytest.mark.parametrize("endings", [KOHYA, PEFT])
def test_another_implementations_names_go_through_diffusers_converter_and_keep_their_alpha(
    tiny_flux, tmp_path, spell, endings
):
    """Black Forest Labs keeps q, k, v in one matrix: one layer becomes three with the same total delta."""
    generator = torch.Generator().manual_seed(1)
    original = {
        "double_blocks.0.img_attn.qkv": (32, 96), "double_blocks.1.txt_attn.proj": (32, 32),
        "single_blocks.1.linear2": (160, 32),
    }  # fmt: skip
    layers = {
        name: (torch.randn(RANK, rows, generator=generator), torch.randn(columns, RANK, generator=generator))
        for name, (rows, columns) in original.items()
    }
    file = written(tmp_path / "l.safetensors", layers, spell, endings, lambda name: ALPHA)
    found = read_lora(file, tiny_flux).layers

    def delta(module):
        return found[module].scale * found[module].up @ found[module].down

    def by_hand(name):
        return ALPHA / RANK * layers[name][1] @ layers[name][0]

    parts = [delta(f"transformer_blocks.0.attn.to_{part}") for part in "qkv"]
    torch.testing.assert_close(torch.cat(parts), by_hand("double_blocks.0.img_attn.qkv"))
    torch.testing.assert_close(delta("transformer_blocks.1.attn.to_add_out"), by_hand("double_blocks.1.txt_attn.proj"))
    torch.testing.assert_close(delta("single_transformer_blocks.1.proj_out"), by_hand("single_blocks.1.linear2"))
    assert len(found) == 5


def test_a_converter_that_loses_a_layer_is_not_believed(tiny_flux, tmp_path, monkeypatch):
    layers = {f"double_blocks.{i}.txt_attn.proj": (torch.ones(RANK, 32), torch.ones(32, RANK)) for i in range(2)}
    file = written(tmp_path / "l.safetensors", layers, lambda name: "lora_unet_" + name.replace(".", "_"), KOHYA)
    assert len(read_lora(file, tiny_flux).layers) == 2
    convert = type(tiny_flux).lora_state_dict

    def forgetful(tensors, **options):
        return {key: value for key, value in convert(tensors, **options).items() if ".1." not in key}

    monkeypatch.setattr(type(tiny_flux), "lora_state_dict", forgetful)
    with pytest.raises(UserError, match="2 of its 2 layers are not in the transformer"):
        read_lora(file, tiny_flux)


@pytest.mark.parametrize("size", [1e-3, 0.0])
def test_a_layer_in_other_names_than_the_rest_is_not_lost_however_small_it_is(tiny_sd, tmp_path, size):
    """diffusers renames a file with a diffusers' name in it not at all, and takes LDM's names for none of its own."""
    pipeline = load_pipeline(str(tiny_sd))
    layers = random_layers(pipeline.unet, ("to_q", "to_v"))
    mixed, ldm = tmp_path / "mixed.safetensors", tmp_path / "ldm.safetensors"
    own, other = "down_blocks_1_attentions_0_", "input_blocks_3_1_"
    extra = {f"lora_unet_{other}transformer_blocks_0_attn1_to_k{KOHYA[0]}": torch.ones(RANK, 32)}
    extra |= {f"lora_unet_{other}transformer_blocks_0_attn1_to_k{KOHYA[1]}": torch.full((32, RANK), size)}
    save_file(load_file(written(mixed, layers, *LAYOUTS["kohya"])) | extra, mixed)
    with pytest.raises(UserError, match="1 of its .* layers are not in the unet .*input_blocks_3_1_transformer"):
        read_lora(mixed, pipeline)
    renamed = {key.replace(own, other): value for key, value in load_file(mixed).items() if own in key or other in key}
    save_file(renamed, ldm)
    assert len(read_lora(ldm, pipeline).layers) == len(renamed) / 2


def test_a_layer_whose_flat_name_could_be_two_modules_is_not_guessed():
    network = torch.nn.ModuleDict(
        {"a_b": torch.nn.Linear(2, 2), "a": torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})}
    )
    assert match({"lora_unet_a_b": 0}, network, "unet") == {"a_b": 0}, "its own name as it is"
    assert match({"unet.a.b": 0}, network, "unet") == {"a.b": 0}
    assert json.dumps(match({"lora_unet_a_c": 0}, network, "unet")) == "null"
