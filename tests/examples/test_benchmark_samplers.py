"""The benchmark of the sampling loop at tiny shapes: what it compares is comparable."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samplers


def test_logits_have_the_probabilities_that_were_asked_for():
    logits = samplers.prepared_logits(3, 64, 50)
    law = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
    top = law.max(axis=-1)
    assert 0.19 < top.min() < 0.9 < top.max() < 1.0
    assert (logits.argmax(axis=-1) < 49).all()  # never the mask
    many = samplers.prepared_logits(11, 8, 50)  # eight, and then the same again
    np.testing.assert_array_equal(many[8:], many[:3])


@pytest.mark.slow
def test_work_on_the_stub_stays_in_the_loop():
    """Without the barrier the compiler reads the same logits once, before the loop."""
    params = jnp.asarray(samplers.prepared_logits(1, 4, 5_000))

    def plain(params, tokens, positions, segment_ids, scored):
        return params

    inside = []
    for predict in (samplers.stub, plain):
        request = samplers.request_of(predict, params, _rule(4), 1, 4)
        text = _compiled(request, params)
        texts = _callees(text, _while_bodies(text))
        inside.append(sum(one.count(" exponential(") for one in texts))
    assert inside[0] > inside[1]


@pytest.mark.slow
def test_torch_decodes_the_same_tokens():
    torch = pytest.importorskip("torch")
    import torch_decoding

    rows, width, size = 3, 8, 40
    logits = samplers.prepared_logits(rows, width, size)
    logits[..., size - 1] = -np.inf
    params = jnp.asarray(logits)
    for name, case in samplers.cases(width).items():
        if case.torch is None:
            continue
        request = samplers.request_of(samplers.stub, params, case.rule, rows, width)
        state = samplers.run_request(request, params)
        start = torch.full((rows, width), size - 1)
        tokens, calls = torch_decoding.decode(
            lambda _: torch.from_numpy(logits), start, size - 1, **case.torch
        )
        np.testing.assert_array_equal(state.tokens, tokens.numpy(), err_msg=name)
        assert calls == int(state.counts.whole_calls) == int(np.max(state.nfe))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quick_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    try:
        config = samplers.Config(workdir=str(tmp_path), quick=True, threads=0)
        result = samplers.run(config)
    finally:
        torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["ok"]
    figures = result["figures"]
    assert set(figures["compilations"].values()) == {1}
    assert figures["beside_torch"]["top-1"]["same_tokens"]
    for entry in figures["outside_the_model"].values():
        assert entry["microseconds"]["median"] > entry["stub_microseconds"]["median"]


def _rule(steps):
    return samplers.FixedQuota(num_steps=steps)


def _compiled(request, params):
    lowered = samplers.generate.lower(
        request.predict,
        params,
        jnp.array(request.tokens),
        request.problem,
        request.program,
        spec=request.spec,
    )
    return lowered.compile().as_text()


def _computations(text):
    """Name to text of every computation of an optimised module."""
    found, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and (line.startswith(("%", "ENTRY"))):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            found[name] = ""
        elif name is not None:
            found[name] += line + "\n"
    return found


def _while_bodies(text):
    return [
        part.split("body=")[1].split(",")[0].split(" ")[0].lstrip("%")
        for part in text.splitlines()
        if "body=" in part
    ]


def _callees(text, names):
    """Texts of these computations and of all that they call."""
    computations, seen, queue = _computations(text), set(), list(names)
    while queue:
        name = queue.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        body = computations[name]
        queue += [other for other in computations if f"%{other}" in body]
    return [computations[name] for name in seen]
