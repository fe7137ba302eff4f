"""A program is run, walked with several states, and stored; a stored one can call nothing but tensor functions."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nettrim.errors import ProblemError, RunError, UnsupportedError
from nettrim.network.batches import Batch
from nettrim.network.edit import double_copy, raw_state
from nettrim.network.functions import find_function, resolve, works_in_place
from nettrim.network.observe import observe
from nettrim.network.program import Count, Held, Program, Ref, Step, leaves, run, substitute, walk
from nettrim.network.program_json import from_json, to_json

RELU = "torch.nn.functional.relu"
LINEAR = "torch.nn.functional.linear"


def chain(layers: int = 3) -> tuple[Program, dict[str, Tensor]]:
    """A chain of Linear layers with ReLUs, and its state."""
    steps, state = [Step("input", where="0", shape=(Count(0, 1), 4))], {}
    for k in range(layers):
        state[f"{k}.weight"] = torch.randn(4, 4, dtype=torch.float64)
        state[f"{k}.bias"] = torch.randn(4, dtype=torch.float64)
        at = len(steps) - 1
        steps.append(Step(LINEAR, (Ref(at), Held(f"{k}.weight"), Held(f"{k}.bias")), where=str(k)))
        steps.append(Step(RELU, (Ref(at + 1),)))
    return Program(tuple(steps), (0,), Ref(len(steps) - 1)), state


def batch(rows: int = 5) -> Batch:
    return Batch((torch.randn(rows, 4, dtype=torch.float64),))


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for k in range(len(state) // 2):
        x = (x @ state[f"{k}.weight"].T + state[f"{k}.bias"]).clamp(min=0)
    return x


def test_run_gives_what_the_steps_say():
    program, state = chain()
    samples = batch()
    torch.testing.assert_close(run(program, state, samples), by_hand(state, samples.inputs[0]))


def test_walk_gives_for_every_state_what_run_gives():
    program, state = chain()
    states = [state, state | {"1.weight": 2 * state["1.weight"]}, state | {"2.bias": state["2.bias"] + 1}]
    samples = batch()
    moments = list(walk(program, states, samples))
    assert [moment.at for moment in moments] == list(range(1, 7))
    for k, each in enumerate(states):
        assert torch.equal(moments[-1].values[k], run(program, each, samples))
        for moment in moments:
            # the same step with its own arguments
            assert torch.equal(resolve(moment.step.target)(*moment.args[k][0]), moment.values[k])


def test_states_share_what_cannot_differ():
    program, state = chain()
    states = [state, state | {"1.weight": state["1.weight"].clone()}, dict(state)]
    for moment in walk(program, states, batch()):
        one, two, three = moment.values
        assert one is three
        # from the layer on whose weight is another object
        assert (one is two) == (moment.at < 3)


def test_walk_computes_what_is_shared_once(monkeypatch):
    program, state = chain()
    calls = []
    import nettrim.network.program as module

    def counted(target):
        calls.append(target)
        return resolve(target)

    monkeypatch.setattr(module, "resolve", counted)
    list(walk(program, [state, state, dict(state)], batch()))
    assert len(calls) == 6


def test_walk_can_stop_early():
    program, state = chain()
    assert [moment.at for moment in walk(program, [state], batch(), until=2)] == [1, 2]


@pytest.mark.parametrize("how", ["walk", "run"])
def test_values_go_behind_their_last_reader(how):
    program, state = chain(6)
    alive: list[weakref.ref] = []
    most = 0

    def noted(at: int, value: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(value))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    if how == "run":
        run(program, state, batch(), change=noted)
    else:
        for moment in walk(program, [state], batch()):
            noted(moment.at, moment.values[0])
            del moment
    assert len(alive) == 12
    assert most <= 3


def test_a_value_that_is_read_late_is_kept():
    program, state = chain(2)
    late = Step("torch.add", (Ref(1), Ref(4)))
    program = Program((*program.steps, late), (0,), Ref(5))
    samples = batch()
    x = samples.inputs[0]
    wanted = x @ state["0.weight"].T + state["0.bias"] + by_hand(state, x)
    torch.testing.assert_close(run(program, state, samples), wanted)
    torch.testing.assert_close([m.values[0] for m in walk(program, [state], samples)][-1], wanted)
    assert program.last_uses() == [1, 5, 3, 4, 5, 6]
    assert program.users() == [[1], [2, 5], [3], [4], [5], []]


def test_an_output_that_is_not_the_last_step():
    program, state = chain(2)
    program = Program(program.steps, (0,), Ref(2))
    samples = batch()
    wanted = by_hand({"0.weight": state["0.weight"], "0.bias": state["0.bias"]}, samples.inputs[0])
    torch.testing.assert_close(run(program, state, samples), wanted)


def test_changes_are_read_by_later_steps_and_followed_by_gradients():
    program, state = chain(2)
    samples = batch()
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = run(program, state, samples, change=lambda at, value: value * gate if at == 2 else value)
    result.sum().backward()
    assert gate.grad is not None
    assert torch.isfinite(gate.grad)
    assert not run(program, state | {"0.weight": state["0.weight"].requires_grad_()}, samples).requires_grad
    doubled = run(program, state, samples, change=lambda at, value: 2 * value if at == 4 else value)
    torch.testing.assert_close(doubled, 2 * by_hand(state, samples.inputs[0]))


def test_counts_follow_the_batch():
    steps = (
        Step("input"),
        Step("torch.Tensor.reshape", (Ref(0), (Count(0, 2), 2))),
        Step("torch.Tensor.__getitem__", (Ref(1), slice(None, Count(-1, 1), None))),
    )
    program = Program(steps, (0,), Ref(2))
    for rows in (1, 2, 6):
        given = torch.randn(rows, 4)
        assert torch.equal(run(program, {}, Batch((given,))), given.reshape(-1, 2)[: rows - 1])


def test_items_of_tuples():
    steps = (Step("input"), Step("torch.chunk", (Ref(0), 2, 1)), Step("torch.sub", (Ref(1, 0), Ref(1, 1))))
    program, x = Program(steps, (0,), Ref(2)), torch.randn(3, 4)
    assert torch.equal(run(program, {}, Batch((x,))), x[:, :2] - x[:, 2:])
    assert torch.equal(run(Program(steps[:2], (0,), Ref(1, 1)), {}, Batch((x,))), x[:, 2:])


def test_a_missing_input():
    program, state = chain()
    with pytest.raises(ProblemError, match=r"no input 0, which batches\[0\] had"):
        run(program, state, Batch((), {"x": torch.ones(2, 4)}))


class Masked(nn.Module):
    """Takes its dtype, device and lowest number from what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril().to(dtype=x.dtype)
        scores = x[:, None, :] * torch.zeros(4, 4, dtype=x.dtype, device=x.device) + keep
        scores = scores.masked_fill(keep == 0, torch.finfo(x.dtype).min)
        return self.fc(scores.softmax(-1).sum(1))


def test_a_program_of_float64_runs_in_float32():
    model, x = Masked(), torch.randn(5, 4)
    double = double_copy(model)
    program, _ = observe(double, raw_state(double), Batch((x.double(),)))
    result = run(program, raw_state(model.requires_grad_(False)), Batch((x,)))
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, model(x))
    assert run(program, raw_state(double), Batch((x,))).dtype is torch.float64


def test_a_program_without_weights_computes_in_the_dtype_of_its_inputs():
    steps = (Step("input"), Step("torch.mul", (Ref(0), 1e300)), Step("torch.Tensor.to", (Ref(1), torch.float64)))
    program = Program(steps, (0,), Ref(2))
    given = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(run(program, {}, Batch((given,))), given * 1e300)


def test_ops_are_told_by_whatever_name():
    names = {
        "torch.nn.functional.relu": "relu",
        "torch.relu": "relu",
        "torch.Tensor.relu": "relu",
        "aten.relu.default": "relu",
        "torch.functional.einsum": "einsum",
        "torch.Tensor.__add__": "add",
        "torch.Tensor.T.__get__": "T",
        "torch.Tensor.__getitem__": "getitem",
        "aten.add.Tensor": "add",
        "torch.linalg.norm": "linalg.norm",
    }
    assert {name: Step(name).op for name in names} == names


def test_arguments_by_position_or_name_or_not_at_all():
    step = Step("torch.nn.functional.conv2d", (Ref(0), Held("w")), {"stride": 2})
    assert step.argument("weight") == Held("w")
    assert step.argument("stride", 1) == 2
    assert step.argument("padding", 0) == 0
    with pytest.raises(KeyError):
        Step("torch.sigmoid", (Ref(0),)).argument("weight")


def test_batch_norm_has_another_order_under_other_names():
    named = {"weight": "w", "bias": "b", "running_mean": "m", "running_var": "v", "training": False, "eps": 1e-3}
    functional = Step("torch.nn.functional.batch_norm", (Ref(0), "m", "v", "w", "b", False, 0.1, 1e-3))
    plain = Step("torch.batch_norm", (Ref(0), "w", "b", "m", "v", False, 0.1, 1e-3, True))
    operator = Step("aten.batch_norm.default", plain.args)
    for step in (functional, plain, operator):
        assert {key: step.argument(key) for key in named} == named


def everything() -> Program:
    args = (
        Ref(0), Ref(0, 1), Held("a.b"), Count(-1, 2), (1, 2.5, None, True), [3, "text"], slice(None, Count(1, 1), 2),
        Ellipsis, torch.float32, torch.strided, torch.channels_last, torch.device("cpu"), float("inf"), -float("inf"),
    )  # fmt: skip
    steps = (
        Step("input", where="x", shape=(Count(0, 1), 3)),
        Step("torch.add", args, {"alpha": (1,), "more": {"deep": [Ref(0)]}}, "body.0", (Count(0, 3), 1)),
        Step("torch.chunk", (Ref(1), 2)),
    )
    return Program(steps, ("x",), Ref(2, 1), True)


def test_json_gives_back_the_same():
    program = everything()
    again = from_json(json.loads(json.dumps(to_json(program), allow_nan=False)))
    assert again == program
    assert isinstance(again.steps[1].args[4], tuple)
    assert isinstance(again.steps[1].args[5], list)
    nan = Program((Step("input"), Step("torch.mul", (Ref(0), float("nan")))), (0,), Ref(1))
    assert str(from_json(json.loads(json.dumps(to_json(nan), allow_nan=False)))) == str(nan)


def test_what_has_no_json_is_named():
    program = Program((Step("input"), Step("torch.mul", (Ref(0), 1j), where="body")), (0,), Ref(1))
    with pytest.raises(UnsupportedError, match=r"torch\.mul in body takes a complex, which cannot be stored"):
        to_json(program)


def damage(change):
    stored = json.loads(json.dumps(to_json(everything())))
    change(stored)
    return stored


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("steps"),
        lambda s: s.pop("output"),
        lambda s: s.pop("reads_values"),
        lambda s: s.update(steps=None),
        lambda s: s.update(steps="text"),
        lambda s: s.update(steps=[]),
        lambda s: s["steps"].pop(),
        lambda s: s["steps"].pop(0),
        lambda s: s["steps"][1].pop("args"),
        lambda s: s["steps"][1].update(args=5),
        lambda s: s["steps"][1].update(args=[1]),
        lambda s: s["steps"][1].update(kwargs=None),
        lambda s: s["steps"][1].update(shape=7),
        lambda s: s["steps"][1].update(where=None),
        lambda s: s["steps"][1].update(target="os.system"),
        lambda s: s["steps"][1].update(target="input"),
        lambda s: s["steps"][1].update(target=["torch.add"]),
        lambda s: s["steps"][1].update(target=None),
        lambda s: s["steps"][1].update(args={"tuple": [{"ref": [1, None]}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"ref": [-1, None]}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"ref": ["0", None]}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"ref": [0, "a"]}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"ref": [0, None], "held": "x"}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"device": "nowhere"}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"dtype": "load"}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"float": "many"}]}),
        lambda s: s["steps"][1].update(args={"tuple": [{"class": "x"}]}),
        lambda s: s.update(output=[3, None]),
        lambda s: s.update(output=[-1, None]),
        lambda s: s.update(output=None),
        lambda s: s.update(inputs=[]),
        lambda s: s.update(inputs=[None]),
        lambda s: s.update(reads_values="yes"),
    ],
)
def test_damaged_json_is_refused(change):
    with pytest.raises(RunError, match="stored network is no program of this version"):
        from_json(damage(change))


@pytest.mark.parametrize("foreign", [{}, [], "text", 3, None, {"steps": [{}], "inputs": []}])
def test_foreign_json_is_refused(foreign):
    with pytest.raises(RunError, match="stored network is no program of this version"):
        from_json(foreign)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "torch.save", "torch.hub.load", "torch.from_file", "torch.compile", "torch.vmap", "os.system",
        "builtins.eval", "eval", "torch", "", "torch.Tensor", "torch.Tensor.", "torch.nn.Linear",
        "torch.ops.load_library", "torch.manual_seed", "torch.set_default_dtype", "torch.Tensor.mro",
        "torch.Tensor.__torch_function__", "torch.Tensor.__deepcopy__.__globals__.get", "torch.Tensor.__deepcopy__",
        "torch.Tensor.__reduce_ex__", "torch.Tensor.__setstate__", "torch.Tensor.__class__", "torch.Tensor.__init__",
        "torch.Tensor.apply_", "torch.Tensor.map_", "torch.Tensor.register_hook", "torch.Tensor.untyped_storage",
        "torch.Tensor.set_", "torch.Tensor.copy_", "torch.Tensor.__setitem__", "torch.Tensor.__imul__", "torch.relu_",
        "aten.save.default", "aten.from_file.default", "aten.add_.Tensor", "aten.add.out", "aten.add", "aten", "aten.",
        "aten.__class__.mro", "aten.add.__class__", "aten.add.Tensor.__class__", "aten.add.overloads", "prims.add",
        "torch.Tensor._backward_hooks.__get__", "torch.Tensor.new_ones.__call__", "torch.rand", "torch.no_such",
    ],
)  # fmt: skip
def test_only_functions_of_tensors_can_be_named(target):
    assert find_function(target) is None
    with pytest.raises(UnsupportedError, match="is no function that can be followed"):
        resolve(target)


def test_functions_of_tensors_are_found():
    assert resolve("torch.nn.functional.relu") is F.relu
    assert resolve("torch.arange") is torch.arange
    assert resolve("torch.Tensor.unflatten") is torch.Tensor.unflatten
    assert resolve("torch.nn.functional.hardswish") is F.hardswish
    assert resolve("aten.relu.default") is torch.ops.aten.relu.default
    assert resolve("torch.Tensor.T.__get__")(torch.ones(2, 3)).shape == (3, 2)


def test_functions_that_work_in_place_are_told_by_their_names():
    for name in ("torch.relu_", "torch.Tensor.add_", "torch.Tensor.__iadd__", "aten.add_.Tensor", "torch.Tensor.zero_"):
        assert works_in_place(name), name
    for name in ("torch.relu", "torch.Tensor.__add__", "aten.__and__.Tensor", "torch.Tensor.T.__get__", "torch.ones"):
        assert not works_in_place(name), name


def test_leaves_and_substitutes_go_through_everything():
    value = (1, [Ref(0), {"a": (Held("w"), slice(None, Count(0, 1)))}], Ref(2, 1))
    assert [leaf for leaf in leaves(value) if leaf is not None] == [1, Ref(0), Held("w"), Count(0, 1), Ref(2, 1)]
    changed = substitute(copy.deepcopy(value), lambda leaf: leaf.step + 10 if isinstance(leaf, Ref) else leaf)
    assert changed == (1, [10, {"a": (Held("w"), slice(None, Count(0, 1)))}], 12)
