"""Checkpoints of public families: same logits as transformers, exact round trips."""

import dataclasses
import functools
import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from diffmm._tree import map_with_name, named_leaves
from diffmm.models import (
    FAMILIES,
    Denoiser,
    TransformerConfig,
    export_pretrained,
    load_pretrained,
    logical_axes,
    num_parameters,
    predict_fn,
    repeat_heads,
    training_flops_per_token,
)
from diffmm.models.hf_config import to_config
from diffmm.models.tensor_files import TensorFiles
from diffmm.training import (
    FULLY_SHARDED_TENSOR_PARALLEL,
    TENSOR_PARALLEL,
    make_mesh,
    shardings,
)

pytest.importorskip("safetensors", reason="the pretrained extra")

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN = 37, 32, 2, 4, 48
LENGTHS = (9, 5, 7)
# name: (class prefix, heads of keys, tied)
CASES = {
    "llama": ("Llama", 4, False),
    "llama-gqa-tied": ("Llama", 2, True),
    "qwen2-gqa": ("Qwen2", 2, False),
    "qwen2-tied": ("Qwen2", 4, True),
}


@pytest.fixture(scope="module")
def hugging_face():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip(
        "transformers", minversion="5.0", reason="the test extra"
    )
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def checkpoints(hugging_face, tmp_path_factory):
    """Directories by name, and the models that wrote them."""
    import torch

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoints")
    models = {}
    for name, (prefix, key_heads, tied) in CASES.items():
        config = getattr(hugging_face, f"{prefix}Config")(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=key_heads,
            head_dim=WIDTH // HEADS,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            attn_implementation="eager",
            eos_token_id=3,
            pad_token_id=4,
        )
        model = getattr(hugging_face, f"{prefix}ForCausalLM")(config).eval()
        with torch.no_grad():
            # Large enough that every part of the network shows in the logits.
            for parameter in model.parameters():
                parameter.copy_(0.25 * torch.randn(parameter.shape))
                if parameter.ndim == 1:
                    parameter.add_(1.0)
        model.save_pretrained(directory / name)
        models[name] = model
    return directory, models


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
    segments = (np.arange(shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)
    return tokens, segments


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, segments):
    return nnx.merge(graphdef, params)(tokens, None, segments)


def ours(loaded, batch):
    return np.asarray(forward(loaded.graphdef, loaded.params, *batch))


def theirs(model, batch, *, mask=True):
    """Logits of transformers under a full mask, or with whatever mask it makes."""
    import torch

    tokens, segments = (torch.from_numpy(x).long() for x in batch)
    arguments = {"attention_mask": segments}
    if mask:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        arguments["attention_mask"] = torch.where(same, 0.0, -torch.inf)
    with torch.no_grad():
        return model(tokens, use_cache=False, **arguments).logits.float().numpy()


def same_bits(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert np.asarray(value).tobytes() == np.asarray(b[name]).tobytes(), name


def edit_config(source, target, **entries):
    """A copy of a checkpoint with other entries in its config.json."""
    if source != target:
        shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return target


# Configuration


def configured(**fields):
    return TransformerConfig(
        vocabulary_size=11, width=16, num_layers=2, head_dim=4, **fields
    )


def split_model(config):
    """Graph definition and initial parameters, with one compilation."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0))))
    init = jax.jit(lambda: nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))[1])
    return graphdef, init()


def test_shared_keys_are_copied_keys(batch):
    config = configured(num_kv_heads=2, qkv_bias=True)
    full_config = dataclasses.replace(config, num_kv_heads=None)
    graphdef, params = split_model(config)
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    heads = [shapes[f"blocks/attention/{n}"] for n in ("query", "key", "value")]
    assert heads == [(2, 16, 4, 4), (2, 16, 2, 4), (2, 16, 2, 4)]
    assert shapes["blocks/attention/key_bias"] == (2, 2, 4)
    map_with_name(lambda name, leaf, axes: None, params, logical_axes(params))

    def filled(name, leaf):
        if not name.endswith("_bias"):
            return leaf
        assert not leaf.any()  # biases start at 0
        return 0.3 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(
            leaf.shape
        )

    params = map_with_name(filled, params)
    full = nnx.eval_shape(lambda: Denoiser(full_config, rngs=nnx.Rngs(0)))
    full_graphdef, full_shapes = nnx.split(full)
    copied = jax.tree.map(
        lambda leaf, to: leaf if leaf.shape == to.shape else jnp.repeat(leaf, 2, -2),
        params,
        full_shapes,
    )
    tokens, segments = batch[0] % 11, batch[1]
    got = forward(graphdef, params, tokens, segments)
    expected = forward(full_graphdef, copied, tokens, segments)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    model = nnx.merge(graphdef, params)
    statistics = jax.eval_shape(model.attention_statistics, jnp.asarray(tokens))
    assert statistics.row_mass.shape == (2, 4)
    # Two of four heads of keys and values: 2·D·K·2 weights less per block.
    counts = [training_flops_per_token(c, 5) for c in (full_config, config)]
    assert counts[0] - counts[1] == 6 * 2 * (2 * 16 * 4 * 2)


def test_repeat_heads_serves_neighbours():
    x = jnp.arange(2.0)[None, None, :, None]
    assert repeat_heads(x, 4)[0, 0, :, 0].tolist() == [0, 0, 1, 1]
    assert repeat_heads(x, 2) is x


def test_tied_model_has_one_table():
    graphdef, params = split_model(configured(tied=True))
    untied_graphdef, untied = split_model(configured())
    leaves, others = named_leaves(params), named_leaves(untied)
    assert set(others) - set(leaves) == {"unembedding"}
    same_bits(leaves, {name: others[name] for name in leaves})
    matrix = nnx.merge(graphdef, params).output_matrix
    np.testing.assert_array_equal(matrix, leaves["embedding"].T)
    assert nnx.merge(untied_graphdef, untied).output_matrix.shape == (16, 11)
    scored = jnp.zeros((1, 2), jnp.int32)
    row = (jnp.zeros((1, 3), jnp.int32),) * 3
    logits = jax.eval_shape(predict_fn(graphdef), params, *row, scored)
    assert logits.shape == (1, 2, 11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide the 4 heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        configured(**fields)


def test_mlp_width():
    assert configured(mlp_width=24).mlp_hidden == 24


# Import


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(checkpoints, batch, name):
    directory, models = checkpoints
    loaded = load_pretrained(directory / name, dtype="float32")
    expected = theirs(models[name], batch)
    real = batch[1] == 1
    got = ours(loaded, batch)[real]
    np.testing.assert_allclose(got, expected[real], rtol=1e-4, atol=1e-4)
    # Logits of order one, to which every later token contributes.
    assert expected[real].std() > 0.5
    causal = theirs(models[name], batch, mask=False)[real]
    assert np.abs(causal - expected[real]).max() > 0.1
    assert (loaded.eos_id, loaded.pad_id, loaded.mask_id) == (3, 4, None)
    assert loaded.shift == 1
    assert loaded.config.rope_base == 5e5
    assert loaded.config.norm_epsilon == 1e-5


def test_causal_on_request(checkpoints, tmp_path):
    path = checkpoints[0] / "llama"
    assert not load_pretrained(path).config.causal
    assert load_pretrained(path, causal=True).config.causal
    path = edit_config(path, tmp_path / "edited", is_causal=True)
    assert load_pretrained(path).config.causal


LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 36,
    "mlp_hidden_size": HIDDEN,
    "model_type": "llada",
    "n_heads": HEADS,
    "n_kv_heads": 4,
    "n_layers": LAYERS,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 5e5,
    "scale_logits": False,
    "vocab_size": VOCABULARY,
    "weight_tying": False,
}
LLADA_NAMES = (
    ("model.embed_tokens", "model.transformer.wte"),
    ("model.norm", "model.transformer.ln_f"),
    ("lm_head", "model.transformer.ff_out"),
    ("model.layers", "model.transformer.blocks"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ff_norm"),
    ("self_attn.o_proj", "attn_out"),
    ("self_attn.", ""),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
)


def read_all(directory):
    files = TensorFiles(directory)
    return {
        name: files.read(name, [(0, size) for size in stored.shape])
        for name, stored in files.stored.items()
    }


def write_all(directory, tensors, config):
    from safetensors.numpy import save_file

    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_llada_names(checkpoints, tmp_path):
    directory, _ = checkpoints
    tensors = {}
    for name, value in read_all(directory / "llama").items():
        for old, new in LLADA_NAMES:
            name = name.replace(old, new)
        tensors[name] = value
    assert "model.transformer.blocks.1.attn_out.weight" in tensors
    path = write_all(tmp_path / "llada", tensors, LLADA_CONFIG)
    loaded = load_pretrained(path, dtype="float32")
    reference = load_pretrained(directory / "llama", dtype="float32")
    same_bits(loaded.params, reference.params)
    assert loaded.config == reference.config
    assert (loaded.family, loaded.shift, loaded.mask_id) == ("llada", 0, 36)

    # Back under the same names, and the same numbers.
    target = tmp_path / "export"
    export_pretrained(target, loaded.params, loaded.config, family="llada", mask_id=36)
    written = read_all(target)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    again = load_pretrained(target, dtype="float32")
    assert (again.config, again.mask_id) == (loaded.config, 36)


def test_dream_predicts_the_next_position(checkpoints, tmp_path, batch):
    directory, models = checkpoints
    path = edit_config(
        directory / "qwen2-gqa",
        tmp_path / "dream",
        model_type="Dream",
        architectures=["DreamModel"],
        mask_token_id=30,
        layer_types="absent",
    )
    loaded = load_pretrained(path, dtype="float32")
    assert (loaded.family, loaded.shift, loaded.mask_id) == ("dream", 1, 30)
    tokens, segments = (jnp.asarray(x) for x in batch)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    predict = jax.jit(predict_fn(loaded.graphdef, shift=loaded.shift))
    scored = jnp.array([[3, 4], [3, 4], [3, 4]])
    got = predict(loaded.params, tokens, positions, segments, scored)
    expected = theirs(models["qwen2-gqa"], batch)[:, 2:4]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_several_files(checkpoints, tmp_path, batch):
    import torch

    directory, models = checkpoints
    model = models["qwen2-gqa"]
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    path = tmp_path / "bf16"
    model.save_pretrained(path, state_dict=state, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    edit_config(path, path, dtype="bfloat16")
    low = load_pretrained(path)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low.params))
    assert low.config.compute_dtype == "bfloat16"
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16),
        load_pretrained(directory / "qwen2-gqa", dtype="float32").params,
    )
    same_bits(low.params, rounded)
    high = load_pretrained(path, dtype="float32")
    same_bits(
        high.params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low.params)
    )

    # Eight bits of mantissa through two blocks, against logits of order one.
    real = batch[1] == 1
    expected = theirs(model, batch)[real]
    error = ours(low, batch)[real] - expected
    assert 0 < np.abs(error).max() < 2.0**-4 * np.abs(expected).max()

    missing = sorted(path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ValueError, match=f"not there: {missing.name}"):
        load_pretrained(path)


def test_every_device_reads_its_own_part(checkpoints, monkeypatch):
    directory, _ = checkpoints
    path = directory / "qwen2-gqa"
    whole = load_pretrained(path, dtype="float32")
    read = []
    original = TensorFiles.read

    def counted(self, name, index):
        values = original(self, name, index)
        read.append(values.size)
        return values

    monkeypatch.setattr(TensorFiles, "read", counted)

    def by_table(mesh, table):
        return lambda shapes: shardings(
            mesh,
            shapes,
            logical_axes(shapes),
            # 37 tokens split over nothing.
            {**table, "vocab": None},
        )

    def odd(shapes):
        """Splits layers and head dimension, which no table of ours does."""
        mesh = make_mesh(data=2, model=2)

        def place(name, _):
            spec = ["model"] if name.startswith("blocks/") else []
            if name.endswith(("query", "key", "value", "key_bias")):
                spec += [None] * (1 if name.endswith("bias") else 2) + ["data"]
            if name.endswith("output"):
                spec += [None, "data"]
            return NamedSharding(mesh, PartitionSpec(*spec))

        return map_with_name(place, shapes)

    size = sum(leaf.size for leaf in jax.tree.leaves(whole.params))
    for placement in (
        by_table(make_mesh(data=1, model=2), TENSOR_PARALLEL),
        by_table(make_mesh(data=2, model=2), FULLY_SHARDED_TENSOR_PARALLEL),
        odd,
    ):
        read.clear()
        loaded = load_pretrained(path, dtype="float32", shardings=placement)
        same_bits(loaded.params, whole.params)
        for name, leaf in named_leaves(loaded.params).items():
            reference = np.asarray(named_leaves(whole.params)[name])
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, reference[shard.index])
        if placement is odd:
            query = named_leaves(loaded.params)["blocks/attention/query"]
            assert query.addressable_shards[0].data.shape == (1, WIDTH, HEADS, 4)
        else:
            # Every number once, however many devices hold it.
            assert sum(read) == size


def test_differing_tensors_are_all_named(checkpoints, tmp_path, monkeypatch):
    directory, _ = checkpoints
    tensors = read_all(directory / "llama")
    config = json.loads((directory / "llama" / "config.json").read_text())
    norm = "model.layers.1.input_layernorm.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    gone = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    for name in gone:
        del tensors[name]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors[norm] = tensors[norm][:-1]
    tensors[down] = tensors[down].T.copy()
    tensors["lm_head.weight"] = np.zeros((VOCABULARY, WIDTH), np.int8)
    # Old files hold these; they follow from the configuration.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    path = write_all(tmp_path / "broken", tensors, config)
    monkeypatch.setattr(TensorFiles, "read", None)  # nothing is read before
    with pytest.raises(ValueError, match="tensors are not those") as error:
        load_pretrained(path)
    message = str(error.value)
    assert "2 missing: " in message
    assert "1 extra: model.layers.2.mlp.up_proj.weight;" in message
    assert f"{norm} [31] instead of [32]" in message
    assert f"{down} [48, 32] instead of [32, 48]" in message
    assert "lm_head.weight I8" in message
    for name in gone:
        assert name in message
    assert "inv_freq" not in message


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
                "attention_bias": True,
                "hidden_act": "gelu",
                "head_dim": 16,
                "hidden_size": None,
            },
            ["rope_scaling={", "attention_bias=True", "'gelu'", "hidden_size is miss"],
        ),
        ({"num_attention_heads": 5}, ["num_attention_heads=5 does not divide 32"]),
        ({"head_dim": 16}, ["head_dim=16 (only hidden_size / num_attention_heads"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters"]),
        ({"layer_types": ["sliding_attention"] * 2}, ["sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "mixtral"}, ["mixtral", "family="]),
        ({"architectures": ["LlamaForTokens"]}, ["LlamaForTokens"]),
        ({"mask_token_id": VOCABULARY}, ["mask_id must be in [0, 37), got 37"]),
        ({"prediction_shift": 2}, ["shift must be 0 or 1, got 2"]),
    ],
)
def test_configurations_that_are_not_ours(checkpoints, tmp_path, entries, parts):
    path = edit_config(checkpoints[0] / "llama", tmp_path / "edited", **entries)
    with pytest.raises(ValueError, match=r".") as error:
        load_pretrained(path)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("family", "entries", "size"),
    [
        # Half of total_size in the published index of LLaDA-8B, which is in bfloat16.
        (
            "llada",
            LLADA_CONFIG
            | {
                "d_model": 4096,
                "embedding_size": 126464,
                "mlp_hidden_size": 12288,
                "n_heads": 32,
                "n_kv_heads": 32,
                "n_layers": 32,
            },
            16_031_162_368 // 2,
        ),
        # Parameters of Qwen2.5-7B, of which Dream-7B has the shape.
        (
            "dream",
            {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_attention_heads": 28,
                "num_hidden_layers": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            7_615_616_512,
        ),
    ],
)
def test_published_sizes(family, entries, size):
    config = to_config(FAMILIES[family], entries)
    model = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    assert num_parameters(nnx.state(model)) == size


def test_llada_relatives_are_refused(tmp_path):
    config = LLADA_CONFIG | {"layer_norm_type": "default", "alibi": True}
    path = write_all(tmp_path / "llada", {}, config)
    with pytest.raises(ValueError, match=r"alibi=True.*layer_norm_type='default'"):
        load_pretrained(path)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG))
    with pytest.raises(ValueError, match=r"no \*\.safetensors files"):
        load_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_pretrained(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="family must be one of"):
        load_pretrained(tmp_path, family="gpt2")


def test_missing_library(tmp_path, monkeypatch):
    write_all(tmp_path, {}, LLADA_CONFIG)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r'pip install "diffmm\[pretrained\]"'):
        load_pretrained(tmp_path)


# Export


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2-gqa"])
def test_exports_are_what_was_loaded(hugging_face, checkpoints, tmp_path, batch, name):
    directory, models = checkpoints
    loaded = load_pretrained(directory / name, dtype="float32", mask_id=9, shift=0)
    path = tmp_path / "export"
    export_pretrained(
        path,
        loaded.params,
        loaded.config,
        family=loaded.family,
        max_shard_bytes=20_000,
        mask_id=loaded.mask_id,
        shift=loaded.shift,
        hf_config=loaded.hf_config,
    )
    files = list(path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 25_000 for file in files)
    again = load_pretrained(path, dtype="float32")
    same_bits(again.params, loaded.params)
    assert again.config == loaded.config
    assert (again.mask_id, again.shift, again.eos_ids) == (9, 0, (3,))

    prefix = CASES[name][0]
    model = getattr(hugging_face, f"{prefix}ForCausalLM").from_pretrained(
        path, attn_implementation="eager"
    )
    model.eval()
    state, original = model.state_dict(), models[name].state_dict()
    assert state.keys() == original.keys()
    assert all(state[key].equal(original[key]) for key in original)
    real = batch[1] == 1
    expected = theirs(models[name], batch)[real]
    np.testing.assert_allclose(theirs(model, batch)[real], expected, atol=1e-6)


def test_own_denoiser_as_qwen3(hugging_face, tmp_path, batch):
    config = TransformerConfig(
        vocabulary_size=VOCABULARY,
        width=16,
        num_layers=2,
        head_dim=4,
        num_kv_heads=1,
        mlp_width=24,
    )
    graphdef, params = split_model(config)
    params["unembedding"][...] = params["unembedding"][...] * 16.0
    export_pretrained(tmp_path / "own", params, config, family="qwen3")
    model = hugging_face.AutoModelForCausalLM.from_pretrained(
        tmp_path / "own", attn_implementation="eager"
    ).eval()
    real = batch[1] == 1
    expected = forward(graphdef, params, *batch)
    for mask in (True, False):  # is_causal of config.json, or the mask given
        np.testing.assert_allclose(
            theirs(model, batch, mask=mask)[real],
            np.asarray(expected)[real],
            rtol=1e-4,
            atol=1e-4,
        )
    again = load_pretrained(tmp_path / "own", dtype="float32")
    same_bits(again.params, params)
    assert again.config == config
    with pytest.raises(ValueError, match="holds"):
        export_pretrained(tmp_path / "own", params, config, family="qwen3")


def test_exports_that_no_family_has(tmp_path):
    config = configured(hybrid_norm=True, attention="sigmoid", length=8)
    params = nnx.state(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"attention='sigmoid'.*qk_norm=.*hybrid_norm"):
        export_pretrained(tmp_path / "x", params, config, family="llama")
    plain = configured(qk_norm=None)
    with pytest.raises(ValueError, match=r"not those of config.*post_norm"):
        export_pretrained(tmp_path / "x", params, plain, family="llama")
    params = nnx.state(nnx.eval_shape(lambda: Denoiser(plain, rngs=nnx.Rngs(0))))
    for fields, message in (
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive"),
        ({"family": "gpt2"}, "family must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            export_pretrained(
                tmp_path / "x", params, plain, **{"family": "llama", **fields}
            )
    assert not (tmp_path / "x").exists()
