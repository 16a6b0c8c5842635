"""Prompt embeddings on disk: bit-equal to the encoder's, the negative once, whole files only, encoders let go."""

import json
import multiprocessing
import os
from pathlib import Path

import diffusers
import families
import pytest
import tiny
import torch
from cast import SIZE, draws
from run_helpers import assert_same_gradients, gradients_of, prepared, recipe_with, run_to_end, weights_of
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from diffopd import distill as loop
from diffopd import embeddings as on_disk
from diffopd.adapters import freeze
from diffopd.drive import Call, rollout, shell
from diffopd.embeddings import PromptEmbeddings, cache_folder, fingerprint, run_to_denoiser, text_encoders
from diffopd.errors import UserError
from diffopd.supervise import Watch

PROMPTS = ["a red dot", "a line", "two red dots"]


def build_sd3():
    """A random SD3 pipeline with two CLIP text encoders and a T5."""
    import transformers

    tokenizer = tiny.build_tokenizer()
    letters = [(character, -1.0) for character in "abcdefghijklmnopqrstuvwxyz▁"]
    t5_tokenizer = transformers.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters[:-1]]
    )
    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        projection_dim=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = transformers.T5Config(vocab_size=len(t5_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=SIZE,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        text_encoder=transformers.CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5),
        tokenizer_3=t5_tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    return pipeline


BUILDERS = {"SD": tiny.build_pipeline, "SD3": build_sd3}


@pytest.fixture(params=BUILDERS)
def pipeline(request):
    built = BUILDERS[request.param]()
    freeze(built)
    return built


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOPD_CACHE", str(tmp_path / "cache"))
    return cache_folder()


def call_of(pipeline, **told):
    size = {} if hasattr(pipeline, "unet") else {"height": SIZE, "width": SIZE, "max_sequence_length": 16}
    return Call(pipeline, {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", **size, **told})


def encoder_calls(pipeline):
    """How often each text encoder has been asked, counted from now on."""
    counts = dict.fromkeys(text_encoders(pipeline), 0)

    def counted(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name, encoder in text_encoders(pipeline).items():
        encoder.register_forward_pre_hook(counted(name))
    return counts


def states_of(call):
    return [visit.model_output for visit in rollout(call)]


def said_by(pipeline, prompts, negative):
    """What the pipeline's own code hands to its denoiser for each prompt alone."""
    seen = []
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for prompt in prompts:
        handle = denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([v for v in kwargs.values() if isinstance(v, torch.Tensor)]),
            with_kwargs=True,
        )
        told = call_of(pipeline, negative_prompt=negative).prompted([prompt], latents=draws(1, 1)).arguments
        pipeline(**told)
        handle.remove()
    return seen


@pytest.mark.parametrize("negative", ["", "ugly"])
def test_the_denoiser_is_told_the_very_same_tensors(pipeline, cache, negative):
    plain = said_by(pipeline, PROMPTS, negative)
    cached = shell(pipeline)
    embeddings = PromptEmbeddings(pipeline, cache)
    embeddings.attach(cached)
    for _ in ("written", "read"):
        told = said_by(cached, PROMPTS, negative)
        assert len(told) == len(plain) > 0
        assert all(torch.equal(a, b) for x, y in zip(plain, told, strict=True) for a, b in zip(x, y, strict=True))
    assert embeddings.encoded == len(PROMPTS) + 1 + 1  # the negative once, and one check that halves make a whole


def test_a_batch_of_stored_prompts_walks_as_the_encoded_batch_does(pipeline, cache):
    plain = states_of(call_of(pipeline).prompted(PROMPTS, latents=draws(3, 2)))
    cached = shell(pipeline)
    embeddings = PromptEmbeddings(pipeline, cache)
    embeddings.attach(cached)
    for prompt in PROMPTS:
        run_to_denoiser(call_of(cached).prompted([prompt]))
    counts = encoder_calls(pipeline)
    for a, b in zip(plain, states_of(call_of(cached).prompted(PROMPTS, latents=draws(3, 2))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(counts.values())


def test_each_prompt_and_the_negative_are_encoded_once(pipeline, cache):
    counts = encoder_calls(pipeline)
    cached = shell(pipeline)
    embeddings = PromptEmbeddings(pipeline, cache)
    embeddings.attach(cached)
    call = call_of(cached, negative_prompt="ugly")
    embeddings.fill(call, PROMPTS)
    first = dict(counts)
    embeddings.fill(call, PROMPTS)
    # per prompt one call; for the negative's own entry and for the check, prompt and negative: two each
    assert first == counts == dict.fromkeys(counts, len(PROMPTS) + 2 + 2)
    assert len(list(cache.glob("*.safetensors"))) == len(PROMPTS) + 1


@pytest.mark.parametrize("left", [0, 40, -1], ids=["nothing", "a part", "zeros"])
def test_a_damaged_file_is_encoded_anew_with_a_word(cache, left):
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    embeddings = PromptEmbeddings(pipeline, cache)
    embeddings.attach(pipeline)
    embeddings.fill(call_of(pipeline), ["a dot"])
    file = sorted(cache.iterdir())[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:left] if left >= 0 else bytes(len(whole)))
    with pytest.warns(UserWarning, match=f"{file.name}: is damaged .* is encoded anew"):
        embeddings.fill(call_of(pipeline), ["a dot"])
    assert file.read_bytes() == whole


def test_other_weights_other_words_and_other_arguments_have_other_keys(cache):
    sd3, pipeline = build_sd3(), tiny.build_pipeline()
    cached = shell(sd3)
    PromptEmbeddings(sd3, cache).attach(cached)
    for told in ({}, {"max_sequence_length": 12}, {"negative_prompt": "ugly"}, {"prompt_2": ["a line"]}):
        run_to_denoiser(call_of(cached, **told).prompted(["a dot"]))
    assert len(list(cache.glob("*.safetensors"))) == 2 + 2 + 1 + 1
    freeze(pipeline)
    before = fingerprint(pipeline)
    assert fingerprint(shell(pipeline)) == before
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).mul_(1.0001)
    assert fingerprint(pipeline) != before
    assert fingerprint(tiny.build_pipeline()) == before
    pipeline.tokenizer.add_tokens(["KEA"])
    assert fingerprint(pipeline) not in (before, fingerprint(tiny.build_pipeline()))


def test_prompts_of_other_lengths_are_refused_in_one_batch(cache):
    """A pipeline that pads to the longest prompt of a batch cannot take stored ones together."""

    class Padding(diffusers.StableDiffusionPipeline):
        def encode_prompt(self, prompt, device=None, num_images_per_prompt=1):
            tokens = self.tokenizer(prompt, padding="longest", return_tensors="pt")
            return self.text_encoder(tokens.input_ids)[0], tokens.attention_mask

    components = tiny.build_pipeline().components
    pipeline = Padding(**components, requires_safety_checker=False)
    plain = pipeline.encode_prompt(["dot", "two"])
    PromptEmbeddings(pipeline, cache).attach(pipeline)
    stored = pipeline.encode_prompt(["dot", "two"])
    torch.testing.assert_close(stored, plain)
    with pytest.raises(UserError, match="batch_size = 1"):
        pipeline.encode_prompt(["dot", "line"])


def test_a_batch_of_old_and_new_prompts_is_stacked_where_the_encoder_is_on_a_gpu(cache, monkeypatch):
    """Files are read to the CPU, encoders answer on their device; fake tensors refuse a mixture as real ones do."""
    files = {}

    def write(file, answer):
        files[file] = on_disk._on("cpu", answer)
        file.touch()

    class Pipeline:
        components, config, _execution_device = {}, {}, torch.device("cuda:0")

        def encode_prompt(self, prompt, device=None, num_images_per_prompt=1):
            return torch.zeros(len(prompt), 2, device=self._execution_device), None

    monkeypatch.setattr(on_disk, "_write", write)
    monkeypatch.setattr(on_disk, "_read", files.__getitem__)
    pipeline = Pipeline()
    PromptEmbeddings(pipeline, cache).attach(pipeline)
    with FakeTensorMode():
        for prompts in (["dot"], ["dot", "line"], ["new", "line"]):
            found, _ = pipeline.encode_prompt(prompts)
            assert found.shape == (len(prompts), 2) and found.device == pipeline._execution_device


def _fill(folder: Path, start, done) -> None:
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    embeddings = PromptEmbeddings(pipeline, folder)
    embeddings.attach(pipeline)
    start.wait()
    embeddings.fill(call_of(pipeline), [f"a dot number {n}" for n in range(20)])
    done.put(sorted(path.name for path in folder.iterdir() if path.suffix != ".partial"))


def test_two_processes_that_start_together_store_whole_files(cache):
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_fill, args=(cache, start, done)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [done.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found[0] == found[1] and len(found[0]) == 21
    assert sorted(os.listdir(cache)) == found[0]
    for file in cache.iterdir():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def test_a_run_with_stored_prompts_learns_what_one_with_encoders_does(tiny_recipe):
    plain = gradients_of(recipe_with(tiny_recipe))
    for setting in ("cached", "released"):
        stored = gradients_of(recipe_with(tiny_recipe, f'train.text_encoders="{setting}"'))
        assert_same_gradients(plain, stored)


def test_released_encoders_and_vae_are_gone_and_the_run_still_ends(tiny_recipe, cache):
    recipe = recipe_with(tiny_recipe, 'train.text_encoders="released"')
    run, trained = prepared(recipe)
    for pipeline in (run.student.pipeline, *(teacher.call.pipeline for teacher in run.teachers)):
        assert pipeline.text_encoder is None and pipeline.vae is None
        assert pipeline.vae_scale_factor == 2
    loop.one_update(run, trained, Watch())
    with run.student.decoding():
        assert run.student.pipeline.vae is not None
    assert run.student.pipeline.vae is None
    with pytest.raises(UserError, match="'never heard of'.*released"):
        run_to_denoiser(run.student.call.prompted(["never heard of"]))
    folder = run_to_end(recipe)
    assert json.loads((folder.path / "samples" / "trajectory.json").read_text())
    plain = run_to_end(recipe_with(tiny_recipe, f'output_dir="{folder.path.parent}/plain"'))
    one, two = weights_of(folder, 2), weights_of(plain, 2)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_a_pipelines_options_are_part_of_the_key(tmp_path):
    """One option of SDXL says whether an absent negative prompt is encoded or zero."""
    for zeros in (True, False):
        pipeline = families.build("StableDiffusionXL")
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        told = {"prompt": ["a dot"], "device": "cpu", "do_classifier_free_guidance": True}
        plain = pipeline.encode_prompt(**told)
        PromptEmbeddings(pipeline, tmp_path).attach(pipeline)
        stored = pipeline.encode_prompt(**told)
        assert all(torch.equal(a, b) for a, b in zip(stored, plain, strict=True))
        assert bool(plain[1].any()) is not zeros
