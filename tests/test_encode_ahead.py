"""Prompts encoded before the denoiser is loaded: the same tensors, and the encoders gone by then."""

import gc
import weakref

import families
import pytest
import torch
from run_helpers import prepared, recipe_with
from torch.utils._pytree import tree_leaves

from diffopd import assemble
from diffopd.adapters import freeze
from diffopd.drive import Call, denoiser_of
from diffopd.embeddings import text_encoders
from diffopd.encode_ahead import encode_ahead, load_encoders
from diffopd.load import load_pipeline
from diffopd.memory import ReleasedVae
from diffopd.processes import Processes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOPD_CACHE", str(tmp_path / "cache"))


def test_encoders_are_gone_before_the_denoiser_is_loaded(tiny_recipe, monkeypatch):
    """In memory at once they would take what only one of them needs."""
    encoders, vaes, kept_when_loaded = [], [], []
    load_encoders, load_base, init = assemble.load_encoders, assemble.load_pipeline, ReleasedVae.__init__

    def noting(*told):
        pipeline = load_encoders(*told)
        assert all(parameter.is_meta for parameter in pipeline.unet.parameters())
        encoders.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def loading(*args, **kwargs):
        kept_when_loaded.extend(reference() for reference in encoders)
        pipeline = load_base(*args, **kwargs)
        assert pipeline.text_encoder is None
        return pipeline

    def releasing(self, pipelines, *args):
        vaes.append(weakref.ref(pipelines[0].vae))
        init(self, pipelines, *args)

    monkeypatch.setattr(assemble, "load_encoders", noting)
    monkeypatch.setattr(assemble, "load_pipeline", loading)
    monkeypatch.setattr(ReleasedVae, "__init__", releasing)
    run, _ = prepared(recipe_with(tiny_recipe, 'train.text_encoders="released"'))
    gc.collect()
    assert kept_when_loaded == [None]
    assert [reference() for reference in vaes] == [None]
    assert run.student.pipeline.unet is not None


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_encoders_alone_store_what_the_whole_pipeline_says(family, tmp_path):
    """Written by a pipeline whose denoiser has no weights, read by one that has no encoders."""
    row, base = families.FAMILIES[family], tmp_path / "base"
    told = {**row.arguments, **list(row.forms.values())[-1], "num_inference_steps": row.steps, "output_type": "latent"}
    families.build(family).save_pretrained(base)
    whole = load_pipeline(str(base))
    reader = load_encoders(str(base), torch.float32, None, "cpu")
    gone = tuple(text_encoders(reader))
    stored = encode_ahead(reader, [(told, ["a dot"])], Processes())
    assert gone and not text_encoders(reader)
    without = load_pipeline(str(base), leave_out=gone)
    stored.attach(without)
    freeze(whole), freeze(without)
    plain, read = heard(Call(whole, told)), heard(Call(without, told))
    assert len(plain) == len(read) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, read, strict=True))


def heard(call):
    """All tensors that a call gives its denoiser at its first state; states are drawn alike."""
    found = []

    def noting(_, args, kwargs):
        found.extend(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        raise StopIteration

    handle = denoiser_of(call.pipeline).register_forward_pre_hook(noting, with_kwargs=True)
    with pytest.raises(StopIteration), torch.no_grad():
        call.pipeline(**call.prompted(["a dot"], generator=torch.Generator().manual_seed(0)).arguments)
    handle.remove()
    return found
