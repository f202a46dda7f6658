"""A checkpoint is found where the user means it, and every tensor lands exactly once in its place, or is named."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import hf_logits, ids, load_ours, our_logits, random_qwen2, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm import weights
from minivllm.config import ModelConfig
from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.model import Qwen2ForCausalLM
from minivllm.weights import load_dummy_model, load_map, load_model, resolve_dtype, resolve_model

BIAS = "model.layers.0.self_attn.k_proj.bias"
SHA = "0123456789abcdef0123456789abcdef01234567"


def small_config(kv_heads: int = 2, group: int = 2, half_head: int = 2, inner: int = 6, layers: int = 2,
                 tie: bool = False) -> ModelConfig:
    """A config whose every size is drawn on its own."""
    return ModelConfig(vocab_size=11, hidden_size=10, intermediate_size=inner, num_hidden_layers=layers, rms_norm_eps=1e-6,
                       num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads, head_dim=2 * half_head,
                       rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=tie)


def rewrite(folder, change) -> None:
    """Change the tensors of a one-file checkpoint: `change` gets the dictionary and edits it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- Load ----


@settings(max_examples=examples(50))
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 4), half_head=st.integers(1, 3), inner=st.integers(1, 9),
       layers=st.integers(1, 3), tie=st.booleans())
def test_t44_the_load_map_covers_every_row_exactly_once(kv_heads, group, half_head, inner, layers, tie):
    """Counted one by one, every row of every parameter is written by exactly one tensor of the files."""
    model = Qwen2ForCausalLM(small_config(kv_heads, group, half_head, inner, layers, tie), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.zero_()
    for target in load_map(model).values():
        target.view.add_(1)
    for name, parameter in model.named_parameters():
        assert (parameter == 1).all(), f"rows of {name} are written {sorted(set(parameter.flatten().tolist()))} times"


@pytest.mark.parametrize("tie", [True, False])
def test_t44_every_tensor_is_loaded_bit_for_bit(tmp_path, tie):
    """Every tensor of the file, biases and norms included, is found in its rows bit for bit; a tied head has none."""
    _, folder = random_qwen2(tmp_path, 1, tie=tie, heads=14, kv_heads=2, hidden=112)
    targets, tensors = load_map(load_ours(folder)), load_file(folder / "model.safetensors")
    assert targets.keys() == tensors.keys(), f"the map and the file differ in {targets.keys() ^ tensors.keys()}"
    assert ("lm_head.weight" in targets) == (not tie) and BIAS in targets
    for name, target in targets.items():
        assert torch.equal(target.view, tensors[name]), f"{name} was not loaded as it is in the file"


def test_shards_load_as_one_file_does(tmp_path, capsys):
    """Many shards, joined by their index, give the model of one file; a load of several shards shows its progress."""
    _, one = random_qwen2(tmp_path, 2)
    _, many = random_qwen2(tmp_path, 2, max_shard_size="60KB")
    num_shards = len(list(many.glob("*.safetensors")))
    assert num_shards >= 3, f"this test needs shards, there are {num_shards}"
    whole, quiet = load_model(one), capsys.readouterr().err
    sharded, shown = load_model(many), capsys.readouterr().err
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), f"{name} differs between {num_shards} shards and one file"
    assert "Loading weights" in shown and "Loading weights" not in quiet, "the progress bar is for large loads"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_type_that_was_asked_for(tmp_path, dtype):
    """The type asked for is the type of every parameter, rounded once from the file's."""
    _, folder = random_qwen2(tmp_path, 3, dtype=torch.bfloat16)
    model, tensors = load_model(folder, dtype), load_file(folder / "model.safetensors")
    for name, target in load_map(model).items():
        assert torch.equal(target.view, tensors[name].to(getattr(torch, dtype))), f"{name} is not the file's in {dtype}"


@pytest.mark.parametrize(("change", "named"), [
    (lambda tensors: tensors.pop(BIAS), f"lacks {BIAS}"),
    (lambda tensors: tensors.pop("lm_head.weight"), "lacks lm_head.weight"),
    (lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}), "q_norm.weight"),
    (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(4)}), "model.layers.2.mlp.up_proj.weight"),
    (lambda tensors: tensors.update({BIAS: tensors[BIAS][:-1].clone()}), rf"{BIAS} \(31,\) instead of \(32,\)"),
    (lambda tensors: tensors.update({BIAS: tensors[BIAS].to(torch.int8)}), rf"{BIAS} \(I8\)"),
])
def test_t44_a_tensor_that_does_not_fit_is_named(tmp_path, change, named):
    """A tensor that is missing, unexpected, wrongly shaped or no float is named, and no model comes back."""
    _, folder = random_qwen2(tmp_path, 4)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=named):
        load_model(folder)


def test_t44_everything_wrong_is_named_at_once(tmp_path):
    """One error lists all that is missing and unexpected, the first ten of each by name."""
    _, folder = random_qwen2(tmp_path, 4)
    save_file({f"extra.{number}": torch.ones(1) for number in range(12)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model.embed_tokens.weight, .* and 17 more; it has.*extra.0.* and 2 more"):
        load_model(folder)


def test_t44_a_tensor_given_twice_is_refused(tmp_path):
    """Two shards that both carry a tensor are refused by its name: the last one must not win."""
    _, folder = random_qwen2(tmp_path, 5, max_shard_size="60KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(tensors | {name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"gives more than once {name}"):
        load_model(folder)


def test_harmless_extras_are_accepted(tmp_path):
    """RoPE frequencies of old checkpoints, and a tied model's copy of its embedding, do not stop a load."""
    theirs, folder = random_qwen2(tmp_path, 6, tie=True)
    rewrite(folder, lambda tensors: tensors.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    error = relative_error(our_logits(load_ours(folder), ids(0, 9)), hf_logits(theirs, ids(0, 9)))
    assert error < 1e-5, f"with the extras, logits differ by {error:.1e}"


def test_a_tied_head_of_its_own_is_refused(tmp_path):
    """A checkpoint that says tied and carries another head contradicts itself, and says so."""
    _, folder = random_qwen2(tmp_path, 6, tie=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0.5, 0.0, 0.999])
def test_a_truncated_file_is_named(tmp_path, keep):
    """A download that broke off is an error that names the file."""
    _, folder = random_qwen2(tmp_path, 7)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no complete safetensors file"):
        load_model(folder)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    """A pointer of git-lfs in the place of the weights is an error that names the file."""
    _, folder = random_qwen2(tmp_path, 7)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no complete safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    """A shard that the index lists and the folder lacks is named."""
    _, folder = random_qwen2(tmp_path, 7, max_shard_size="60KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}, of"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(tmp_path, content):
    """An index that is no index is an error that names it."""
    _, folder = random_qwen2(tmp_path, 7)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_model(folder)


@pytest.mark.parametrize(("file", "way_out"), [
    ("pytorch_model.bin", "pickled weights.*save_pretrained"), ("model.gguf", r"holds config\.json.*model\.gguf"),
])
def test_a_folder_without_safetensors_says_what_to_do(tmp_path, file, way_out):
    """Weights in another format are refused with a way out: never a model of random numbers."""
    _, folder = random_qwen2(tmp_path, 7)
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=way_out):
        load_model(folder)


class FreshBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.device.type == "meta":
            return result
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if result.untyped_storage().data_ptr() not in given:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("tie", [True, False])
def test_loading_takes_no_memory_but_the_model_and_a_shard(tmp_path, tie):
    """Weights go from the file straight into place: what is allocated is the parameters once, and RoPE's few numbers."""
    _, folder = random_qwen2(tmp_path, 8, tie=tie, vocab=2000, dtype=torch.bfloat16)
    with FreshBytes() as fresh:
        model = load_model(folder, "float32")
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    file_bytes = (folder / "model.safetensors").stat().st_size
    assert weight_bytes <= fresh.bytes <= weight_bytes + file_bytes + 4096, (
        f"loading {weight_bytes} bytes of weights allocated {fresh.bytes}, the file holds {file_bytes}")


# ---- dtype, dummy ----


def test_auto_is_float32_on_a_cpu_and_the_checkpoints_type_elsewhere():
    """`dtype="auto"` is float32 on a CPU and the checkpoint's on CUDA, where a checkpoint that names none is an error."""
    config = small_config()
    assert resolve_dtype("auto", config, "cpu") == torch.float32
    assert resolve_dtype("bfloat16", config, "cpu") == resolve_dtype(torch.bfloat16, config, "cuda") == torch.bfloat16
    half = ModelConfig(**(vars(config) | {"torch_dtype": "float16"}))
    assert resolve_dtype("auto", half, torch.device("cuda:1")) == torch.float16
    for dtype, device in (("auto", "cuda"), ("int8", "cpu")):
        with pytest.raises(ValidationError, match="dtype") as caught:
            resolve_dtype(dtype, config, device)
        assert caught.value.parameter == "dtype"


def test_dummy_weights_are_seeded_and_finite():
    """Dummy weights have the true shape, are the same for the same seed, and give finite logits."""
    config = small_config(tie=True)
    first, again, other = (load_dummy_model(config, "float32", seed=seed) for seed in (1, 1, 2))
    differ = [name for name, parameter in first.named_parameters() if not torch.equal(parameter, again.get_parameter(name))]
    assert not differ, f"the same seed gives another {differ}"
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight), "another seed gives the same weights"
    assert our_logits(first, ids(0, 5, 11)).isfinite().all(), "logits are not finite"


# ---- Find ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with one model, laid out as huggingface_hub does, and no network."""
    assert huggingface_hub.constants.is_offline_mode(), "conftest.py sets HF_HUB_OFFLINE before huggingface_hub is imported"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _, folder = random_qwen2(tmp_path, 9)
    repository = tmp_path / "hub" / "models--some--Qwen-tiny"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / SHA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    (repository / "refs" / "v1.0").write_text(SHA)
    return repository / "snapshots" / SHA


@pytest.mark.parametrize("revision", [None, "main", "v1.0", SHA])
def test_an_id_in_the_cache_works_offline(hub, revision):
    """Offline, an id is found in the hub's cache by branch, tag or commit, and loads."""
    folder = resolve_model("some/Qwen-tiny", revision)
    assert folder.resolve() == hub.resolve(), f"{revision} resolves to {folder}"
    assert load_model(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize(("name", "revision"), [("some/other", None), ("some/Qwen-tiny", "v2.0"), ("gpt2", None)])
def test_an_id_that_is_not_in_the_cache_says_what_to_do(hub, name, revision):
    """Offline, an id or revision that is not cached is an error that names it, the cache and the ways out."""
    with pytest.raises(CheckpointError, match=rf"{name}.*{revision or 'hub'}.*HF_HUB_OFFLINE.*pass the folder"):
        resolve_model(name, revision)


@pytest.mark.parametrize("name", ["./models/qwen", "/no/such", "~/no-such-folder", "../x", "a/b/c", "C:\\models", "a b", ""])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(monkeypatch, tmp_path, name):
    """What looks like a path and does not exist is an error of its own: nobody is asked for a download."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whatever lies beside the checkout
    monkeypatch.setattr(weights, "_from_hub", lambda *_: pytest.fail(f"{name!r} was looked up on the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(name)


def test_a_folder_is_itself_and_a_file_is_refused(tmp_path, monkeypatch):
    """A local folder comes first, relative or absolute; a file in its place says what to give."""
    _, folder = random_qwen2(tmp_path, 9)
    monkeypatch.chdir(folder.parent)
    assert resolve_model(folder) == folder and resolve_model(str(folder)) == folder
    assert resolve_model(folder.name).resolve() == folder.resolve(), "a folder beside an id of the same name comes first"
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(folder / "config.json")


def test_no_name_is_the_embedded_checkpoint():
    """Without a name the checkpoint inside the package is taken, and it loads."""
    model = load_model(resolve_model(None))
    assert model.config.tie_word_embeddings and model.config.num_attention_heads > model.config.num_key_value_heads
    assert our_logits(model, torch.arange(8)).isfinite().all()


def test_an_incomplete_installation_is_named(monkeypatch, tmp_path):
    """A package without its checkpoint is an error that says so."""
    monkeypatch.setattr(weights.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="embedded checkpoint is missing"):
        resolve_model()


def test_modelscope_is_asked_when_its_variable_is_set(monkeypatch, tmp_path):
    """MINIVLLM_USE_MODELSCOPE=1 takes ids from ModelScope, with the revision; its failures are checkpoint errors."""
    asked = []

    def snapshot_download(name, revision, **patterns):
        asked.append((name, revision))
        if name == "no/such":
            raise RuntimeError("404")
        return str(tmp_path)

    monkeypatch.setenv("MINIVLLM_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve_model("Qwen/Qwen2.5-0.5B", "v1") == tmp_path and asked == [("Qwen/Qwen2.5-0.5B", "v1")]
    with pytest.raises(CheckpointError, match=r"ModelScope cannot provide no/such.*404"):
        resolve_model("no/such")
    assert resolve_model(tmp_path) == tmp_path, "a local folder still comes first"


def test_modelscope_without_its_package_says_what_to_install(monkeypatch):
    """MINIVLLM_USE_MODELSCOPE=1 without the package names what to install."""
    monkeypatch.setenv("MINIVLLM_USE_MODELSCOPE", "true")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError, match="pip install modelscope"):
        resolve_model("Qwen/Qwen2.5-0.5B")


def test_a_config_of_another_shape_is_refused(tmp_path):
    """Weights beside another model's config are refused by name and shape, before they are read."""
    _, folder = random_qwen2(tmp_path, 9)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 64}))
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight \(128, 64\) instead of \(64, 64\)"):
        load_model(folder)
