"""What the compiled operators refuse: a table that is not one is an error, and nothing is written."""

import pytest
import torch
from checks import assert_same_bits

from fastsam.spec import NONE, PERTURBATION, ROWS, Map, Row, Update

# The fixtures of conftest.py, for this backend alone.
pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend"),
]

CHUNK = 64
MODES = ("nearest", "stochastic", "masters", "stochastic masters")

# The arguments behind the table, of every use of an operator.
OPERATORS = {
    "norm": "grad_norm_",
    "dots": "dots_",
    "dots of a descent": "dots_",
    "perturb": "perturb_",
    "perturb by a form": "perturb_",
    "restore": "restore_",
    "sgd": "restore_and_update_",
    "adam": "restore_and_update_",
    "sgd by a form": "restore_and_update_",
    "no update": "restore_and_update_",
}
REDUCTIONS = ("norm", "dots", "dots of a descent")
FORMS = ("dots", "dots of a descent", "perturb by a form", "sgd by a form", "no update")
PERTURBS = ("perturb", "perturb by a form")
ONE_OF_EACH = ("norm", "dots", "perturb", "restore", "sgd")
UPDATES = ("sgd", "adam", "sgd by a form", "no update")
FUSED = UPDATES[:3]
OPTIONS_OF = ("norm", *PERTURBS, *FUSED)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def specific_arguments(use):
    """What the operator takes besides the table, all of it correct."""
    ascent = doubles((0.1, 0.0, 0.0, 7.0), (0.2, 1.0, 0.0, 2.0**32 - 1))
    sgd = doubles((0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 7.0)).repeat(2, 1)
    adam = doubles((0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, 1.0, 0.0, 7.0)).repeat(2, 1)
    ascent_by = doubles((0.5, 0.25, 1.0, 0.5)).repeat(2, 1)
    descent = doubles((0.5, 0.25, 0.5, 0.25, 0.5, 0.125, 0.25)).repeat(2, 1)
    if use == "norm":
        outputs = {"partials": torch.full((3,), 7.0).double(), "norm": torch.tensor(7.0).double()}
        return {"options": ascent, **outputs, "finished": None, "first": True, "last": True}
    if use in REDUCTIONS:
        is_ascent = use == "dots"
        form = {"coefficients": ascent_by, "x": Row.GRAD, "y": Row.FIRST_GRAD, "map": Map.IDENTITY, "ascent": is_ascent}
        outputs = {"partials": torch.full((3, 3), 7.0).double(), "result": torch.full((2, 3), 7.0).double()}
        return {**form, **outputs, "finished": None}
    if use == "perturb":
        norm = torch.tensor(2.0, dtype=torch.float64)
        return {"options": ascent, "norm": norm, "coefficients": None, "x": Row.GRAD, "y": NONE, "map": Map.IDENTITY}
    if use == "perturb by a form":
        form = {"x": Row.GRAD, "y": Row.METHOD_STATE, "map": Map.ADAPTIVE}
        return {"options": ascent, "norm": None, "coefficients": ascent_by, **form}
    if use == "restore":
        return {}
    by_form = use in FORMS
    return {
        "update": {"adam": Update.ADAM, "no update": Update.NONE}.get(use, Update.SGD),
        "options": {"adam": adam, "no update": sgd[:0]}.get(use, sgd),
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
        "finished": None,
        "coefficients": descent if by_form else None,
        "y": Row.FIRST_GRAD if by_form else NONE,
        "keeps": by_form,
        "decoupled": by_form,
    }


class Call:
    """Arguments of one operator over two tensors of 100 and 40 elements in two groups; all of them correct.

    ``mode``: "nearest" in float32; "stochastic", "masters" or "stochastic masters" in bfloat16.
    """

    def __init__(self, use, mode="nearest"):
        self.name = OPERATORS[use]
        generator = torch.Generator().manual_seed(1)
        sizes = (100, 40)
        low, masters = torch.float32 if mode == "nearest" else torch.bfloat16, "masters" in mode
        state = torch.float32 if masters else low
        dtypes = [low if row in (Row.PARAM, Row.GRAD, Row.FIRST_GRAD, Row.DIRECTION) else state for row in Row]
        dtypes[Row.MASTER] = dtypes[Row.STEP] = torch.float32
        self.memory = [[torch.rand(s, generator=generator).add_(1).to(dtype) for s in sizes] for dtype in dtypes]
        self.memory[Row.STEP] = [torch.zeros(()), torch.ones(())]
        if masters:
            self.memory[Row.BACKUP] = self.memory[Row.MASTER]
        self.arguments = {
            "addresses": torch.tensor([[t.data_ptr() for t in row] for row in self.memory]),
            "tensors": torch.tensor([sizes, (0, 1)]),
            "chunks": torch.tensor([[0, 0, 0], [0, 64, 128], [1, 0, 128 + 36 + 64]]),
            "chunk_size": CHUNK,
            "dtype": low,
            "device_addresses": None,
            "positions": torch.tensor([[5, -(2**40)], [0, 0]]) if "stochastic" in mode else None,
            "masters": masters,
            **specific_arguments(use),
        }

    def run(self):
        getattr(torch.ops.fastsam, self.name)(*self.arguments.values())

    def everything(self):
        """Copies of all that the operator could write to."""
        written = [self.arguments.get(name) for name in ("partials", "norm", "result")]
        written = [t for t in written if t is not None and t.device.type == "cpu"]
        tensors = [t for row in self.memory for t in row] + written
        return [t.clone() for t in tensors]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", OPERATORS)
def test_a_correct_table_is_accepted(use, mode):
    """Else the refusals below would prove nothing."""
    call = Call(use, mode)
    before = call.everything()
    call.run()
    after = call.everything()
    assert not all(map(torch.equal, after, before))


def replaced(name, change):
    def apply(arguments):
        arguments[name] = change(arguments[name])

    return apply


def at(name, index, value):
    def apply(arguments):
        arguments[name][index] = value

    return apply


def not_contiguous(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


TABLE = {
    "addresses of another dtype": replaced("addresses", torch.Tensor.int),
    "addresses not contiguous": replaced("addresses", lambda t: t.t().contiguous().t()),
    "addresses of fewer rows": replaced("addresses", lambda t: t[: ROWS - 1]),
    "addresses of more rows": replaced("addresses", lambda t: torch.cat([t, t[:1]])),
    "addresses of fewer tensors": replaced("addresses", lambda t: t[:, :1].contiguous()),
    "addresses in one dimension": replaced("addresses", torch.Tensor.flatten),
    "tensors of another dtype": replaced("tensors", torch.Tensor.int),
    "tensors not contiguous": replaced("tensors", lambda t: t.t().contiguous().t()),
    "tensors without groups": replaced("tensors", lambda t: t[:1]),
    "tensors in one dimension": replaced("tensors", torch.Tensor.flatten),
    "more tensors than addresses": replaced("tensors", lambda t: torch.cat([t, t], 1)),
    "chunks of another dtype": replaced("chunks", torch.Tensor.double),
    "chunks not contiguous": replaced("chunks", not_contiguous),
    "chunks of two columns": replaced("chunks", lambda t: t[:, :2].contiguous()),
    "chunks in one dimension": replaced("chunks", torch.Tensor.flatten),
    "a chunk of no tensor": at("chunks", (2, 0), 2),
    "a chunk of a negative tensor": at("chunks", (0, 0), -1),
    "a chunk behind its tensor": at("chunks", (1, 1), 100),
    "a chunk far behind its tensor": at("chunks", (2, 1), 1 << 40),
    "a chunk before its tensor": at("chunks", (0, 1), -1),
    "a chunk with wrong work before it": at("chunks", (1, 2), 127),
    "a tensor of negative size": at("tensors", (0, 1), -40),
    "a tensor smaller than its chunks": at("tensors", (0, 0), 64),
    "chunks of size 0": replaced("chunk_size", lambda _: 0),
    "chunks of negative size": replaced("chunk_size", lambda _: -64),
    "larger chunks than the table was cut into": replaced("chunk_size", lambda _: 128),
    "a parameter without address": at("addresses", (0, 1), 0),
    "integers": replaced("dtype", lambda _: torch.int32),
    "complex numbers": replaced("dtype", lambda _: torch.complex64),
    "addresses elsewhere": replaced("addresses", lambda t: t.to("meta")),
    "tensors elsewhere": replaced("tensors", lambda t: t.to("meta")),
    "chunks elsewhere": replaced("chunks", lambda t: t.to("meta")),
}
OPTIONS = {
    "options of another dtype": replaced("options", torch.Tensor.float),
    "options not contiguous": replaced("options", not_contiguous),
    "options with a field less": replaced("options", lambda t: t[:, :-1].contiguous()),
    "options with a field more": replaced("options", lambda t: torch.cat([t, t[:, :1]], 1)),
    "options in one dimension": replaced("options", torch.Tensor.flatten),
    "a group without options": replaced("options", lambda t: t[:1]),
    "no options": replaced("options", lambda t: t[:0]),
    "a negative group": at("tensors", (1, 0), -1),
    "a group far away": at("tensors", (1, 1), 1 << 40),
    "options elsewhere": replaced("options", lambda t: t.to("meta")),
}
NORM = {
    "norm of another dtype": replaced("norm", torch.Tensor.float),
    "norm of two elements": replaced("norm", lambda t: torch.stack([t, t])),
    "no norm": replaced("norm", lambda t: t[None][:0]),
    "norm elsewhere": replaced("norm", lambda t: t.to("meta")),
}
PARTIALS = {
    "too few partials": replaced("partials", lambda t: t[:2]),
    "too many partials": replaced("partials", lambda t: torch.cat([t, t])),
    "partials of another dtype": replaced("partials", torch.Tensor.float),
    "partials not contiguous": replaced("partials", not_contiguous),
}
RESULT = {
    "too few results": replaced("result", lambda t: t[:1]),
    "results of another dtype": replaced("result", torch.Tensor.float),
    "results not contiguous": replaced("result", not_contiguous),
    "results elsewhere": replaced("result", lambda t: t.to("meta")),
}
COEFFICIENTS = {
    "coefficients of another dtype": replaced("coefficients", torch.Tensor.float),
    "coefficients not contiguous": replaced("coefficients", not_contiguous),
    "coefficients of fewer tensors": replaced("coefficients", lambda t: t[:1]),
    "coefficients with a column less": replaced("coefficients", lambda t: t[:, :-1].contiguous()),
    "coefficients with a column more": replaced("coefficients", lambda t: torch.cat([t, t[:, :1]], 1)),
    "coefficients in one dimension": replaced("coefficients", torch.Tensor.flatten),
    "coefficients elsewhere": replaced("coefficients", lambda t: t.to("meta")),
}
Y = {
    "a y that is a step": replaced("y", lambda _: Row.STEP),
    "a y behind the rows": replaced("y", lambda _: ROWS),
    "a y before the rows": replaced("y", lambda _: PERTURBATION - 1),
}
X_AND_MAP = {
    "an x that is a step": replaced("x", lambda _: Row.STEP),
    "an x behind the rows": replaced("x", lambda _: ROWS),
    "no x": replaced("x", lambda _: NONE),
    "an unknown map": replaced("map", lambda _: len(Map)),
    "a negative map": replaced("map", lambda _: -1),
}
NO_PERTURBATION = {"a y that is the perturbation": replaced("y", lambda _: PERTURBATION)}
NORM_AND_FORM = {
    "neither norm nor coefficients": replaced("norm", lambda _: None),
    "norm and coefficients": replaced("coefficients", lambda _: doubles((0.5, 0.25, 1.0, 0.5)).repeat(2, 1)),
    "a norm of another x": replaced("x", lambda _: Row.DIRECTION),
    "a norm with a y": replaced("y", lambda _: Row.PARAM),
    "a norm with a map": replaced("map", lambda _: Map.POWER),
}
SCALARS = {
    "grad_scale of another dtype": replaced("grad_scale", torch.Tensor.double),
    "grad_scale of two elements": replaced("grad_scale", lambda t: torch.stack([t, t])),
    "found_inf of another dtype": replaced("found_inf", torch.Tensor.int),
    "found_inf of two elements": replaced("found_inf", lambda t: torch.stack([t, t])),
    "found_inf elsewhere": replaced("found_inf", lambda t: t.to("meta")),
    "an unknown update": replaced("update", lambda _: len(Update)),
    "a negative update": replaced("update", lambda _: -1),
}
STATE = {
    "no first moment": at("addresses", (Row.STATE, 1), 0),
    "a step between two floats": at("addresses", (Row.STEP, 0), 1),
}
MOMENTS = {
    "no second moment": at("addresses", (Row.STATE_1, 0), 0),
    "no largest second moment": at("addresses", (Row.STATE_2, 1), 0),
    "no step": at("addresses", (Row.STEP, 1), 0),
}
STOCHASTIC = {
    "positions of another dtype": replaced("positions", torch.Tensor.int),
    "too few positions": replaced("positions", lambda t: t[:1]),
    "too many positions": replaced("positions", lambda t: torch.cat([t, t])),
    "positions not contiguous": replaced("positions", not_contiguous),
    "positions elsewhere": replaced("positions", lambda t: t.to("meta")),
    "nothing to round in float32": replaced("dtype", lambda _: torch.float32),
    "nothing to round in float64": replaced("dtype", lambda _: torch.float64),
}
MASTERS = {
    "a backup that is not the master": at("addresses", (Row.BACKUP, 1), 1 << 40),
    "a backup of what has no master": at("addresses", (Row.MASTER, 0), 0),
    "no masters in float32": replaced("dtype", lambda _: torch.float32),
}


def without_master(arguments):
    arguments["addresses"][[Row.BACKUP, Row.MASTER], 1] = 0


def without_first_grad(arguments):
    arguments["addresses"][Row.FIRST_GRAD, 1] = 0
    arguments |= {"y": Row.METHOD_STATE, "keeps": False}


def cases(uses, spoils, mode="nearest"):
    return [(use, mode, name, spoil) for use in uses for name, spoil in spoils.items()]


CASES = [
    *cases(ONE_OF_EACH, TABLE),
    *cases(OPTIONS_OF, OPTIONS),
    *cases(("norm", "perturb"), NORM),
    *cases(REDUCTIONS, PARTIALS),
    *cases(REDUCTIONS[1:], RESULT),
    *cases([use for use in FORMS if use != "dots of a descent"], COEFFICIENTS),
    *cases(FORMS, Y),
    *cases(("dots", "perturb by a form"), X_AND_MAP),
    *cases(("dots of a descent", "sgd by a form", "no update"), NO_PERTURBATION),
    *cases(["dots of a descent"], {"a map of a descent": replaced("map", lambda _: Map.POWER)}),
    *cases(["perturb"], NORM_AND_FORM),
    *cases(UPDATES, SCALARS),
    *cases(FUSED, STATE),
    *cases(["adam"], MOMENTS),
    *cases(["no update"], {"nowhere to leave the decoupled part": without_first_grad}),
    *cases((*PERTURBS, *FUSED), {"no step": MOMENTS["no step"]}, "stochastic"),
    *cases(PERTURBS, {"no step": MOMENTS["no step"]}, "stochastic masters"),
    *cases(ONE_OF_EACH, MASTERS, "masters"),
    *cases(FUSED, {"no master": without_master}, "masters"),
]
for stochastic in ("stochastic", "stochastic masters"):
    CASES += cases(ONE_OF_EACH, STOCHASTIC, stochastic)


def assert_refused(call, spoil):
    """With an argument that ``spoil`` changes; nothing is written then."""
    spoil(call.arguments)
    before = call.everything()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"fastsam"):
        call.run()
    assert_same_bits(call.everything(), before)


@pytest.mark.parametrize(
    ("use", "mode", "spoil"), [(u, m, spoil) for u, m, _, spoil in CASES], ids=["-".join(c[:3]) for c in CASES]
)
def test_a_table_that_is_none_is_refused(use, mode, spoil):
    assert_refused(Call(use, mode), spoil)


def test_messages_say_what_is_wrong():
    for name, part in {
        "a chunk of no tensor": "chunk 2 is not part of its table",
        "a parameter without address": "tensor 1 has no address",
        "chunks of size 0": "chunk_size must be positive",
        "addresses of another dtype": "addresses has the wrong dtype",
    }.items():
        call = Call("restore")
        TABLE[name](call.arguments)
        with pytest.raises(RuntimeError, match=part):
            call.run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", UPDATES)
def test_what_is_not_needed_may_be_absent(use, mode):
    """A tensor without a gradient needs no state and, unless it is perturbed, no master; an empty one no address."""
    call = Call(use, mode)
    call.arguments["addresses"][Row.GRAD :, 1] = 0
    call.run()
    call = Call(use, mode)
    call.arguments["tensors"][0, 1] = 0
    call.arguments["chunks"] = call.arguments["chunks"][:2]
    call.arguments["addresses"][Row.STATE :, 1] = 0
    call.run()


@pytest.mark.parametrize("mode", ["nearest", "masters"])
def test_sgd_needs_no_step(mode):
    """Where nobody counts, it is not the first step: dampening has its share."""
    call = Call("sgd", mode)
    call.arguments["options"][:, 2] = 0.5
    counted = Call("sgd", mode)
    counted.arguments["options"][:, 2] = 0.5
    counted.memory[Row.STEP][0].fill_(3)
    call.arguments["addresses"][Row.STEP] = 0
    call.run()
    counted.run()
    for row in set(Row) - {Row.STEP}:
        assert_same_bits(call.memory[row], counted.memory[row])


def test_an_empty_tensor_counts_its_steps():
    call = Call("sgd")
    call.arguments["tensors"][0, 1] = 0
    call.arguments["chunks"] = call.arguments["chunks"][:2]
    call.run()
    assert call.memory[Row.STEP] == [1, 2]


def test_what_is_not_perturbed_needs_no_master():
    call = Call("perturb", "stochastic masters")
    before = call.everything()
    without_master(call.arguments)
    call.run()
    for row, expected in zip(call.memory, zip(before[::2], before[1::2], strict=True), strict=False):
        assert_same_bits(row[1], expected[1])


def test_a_table_without_chunks():
    call = Call("norm")
    call.arguments["chunks"] = torch.zeros(0, 3, dtype=torch.int64)
    call.arguments["partials"] = torch.zeros(0, dtype=torch.float64)
    call.run()
    assert call.arguments["norm"] == 0
