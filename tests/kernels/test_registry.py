"""Which implementation of an op serves a call, and what is said of those that do not."""

import re
from collections.abc import Callable

import jax
import pytest

from pallas_kernels import Implementation, Op, Target, assume_target, ops, prefer, record, registry, target
from pallas_kernels.registry import Record, of_kinds


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op that names the implementation it ran; the package's own list stays as it is."""
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))

    def reference(x: int, *, scale: int = 1) -> tuple[str, int]:
        """What the op computes."""
        return "xla", x * scale

    return Op("twice", reference)


def implementation(name: str, refuses: Callable[..., str | None] = lambda x, scale=1: None) -> Implementation:
    return Implementation(name, lambda x, scale=1: (name, x * scale), refuses)


def test_the_package_registers_its_ops() -> None:
    assert {"project", "attend", "attend_cached", "attend_padded", "decode_layers", "feed_forward"} <= ops().keys()
    assert all(name == op.name and "xla" in op.names for name, op in ops().items())


def test_ops_gives_a_copy(op: Op) -> None:
    ops().clear()
    assert ops()["twice"] is op


def test_an_op_alone_runs_its_reference_and_shows_its_text(op: Op) -> None:
    assert op(3, scale=5) == ("xla", 15)
    assert op.__doc__ == op.reference.__doc__ == "What the op computes."


def test_what_is_registered_last_is_tried_first(op: Op) -> None:
    op.register(implementation("slow"))
    op.register(implementation("fast"))
    assert op.names == ("fast", "slow", "xla")
    assert op(3, scale=5) == ("fast", 15)
    assert op.choose(3) == (op._implementations[0], {})


def test_a_refusal_passes_the_call_on_and_its_reason_is_kept(op: Op) -> None:
    op.register(implementation("even", lambda x, scale=1: "x is odd" if x % 2 else None))
    op.register(implementation("unscaled", lambda x, scale=1: "scale is not 1" if scale != 1 else None))
    op.register(implementation("never", lambda *args, **kwargs: "no GPU"))
    served = {(x, scale): op.choose(x, scale=scale) for x in (2, 3) for scale in (1, 5)}
    assert {call: (chosen.name, refusals) for call, (chosen, refusals) in served.items()} == {
        (2, 1): ("unscaled", {"never": "no GPU"}),
        (3, 1): ("unscaled", {"never": "no GPU"}),
        (2, 5): ("even", {"never": "no GPU", "unscaled": "scale is not 1"}),
        (3, 5): ("xla", {"never": "no GPU", "unscaled": "scale is not 1", "even": "x is odd"}),
    }
    assert op(3, scale=5) == ("xla", 15)


def test_an_implementation_can_be_asked_for_by_name(op: Op) -> None:
    op.register(implementation("slow"))
    op.register(implementation("fast"))
    for name in op.names:
        assert op(2, implementation=name) == (name, 2)


def test_one_asked_for_by_name_that_refuses_is_an_error_with_its_reason(op: Op) -> None:
    op.register(implementation("even", lambda x: "x is odd" if x % 2 else None))
    op.register(implementation("other", lambda x: "never asked"))
    assert op(2, implementation="even") == ("even", 2)
    with pytest.raises(ValueError, match=re.escape("twice: even refuses: x is odd")):
        op(3, implementation="even")


def test_an_unknown_name_is_an_error_that_lists_the_known(op: Op) -> None:
    op.register(implementation("fast"))
    with pytest.raises(ValueError, match=re.escape("twice has no implementation 'triton'; it has fast, xla")):
        op(3, implementation="triton")


def test_a_name_is_registered_once(op: Op) -> None:
    op.register(implementation("fast"))
    for name in ("fast", "xla"):
        with pytest.raises(ValueError, match=f"twice already has an implementation named '{name}'"):
            op.register(implementation(name))
    assert op.names == ("fast", "xla")


def test_an_implementation_that_no_call_can_use_here_refuses_them_all(op: Op) -> None:
    def unavailable(device: Target) -> str | None:
        return None if device.platform == "cuda" else f"no kernels for {device.platform}"

    op.register(Implementation("kernel", lambda x: ("kernel", x), lambda x: "x is odd" if x % 2 else None, unavailable))
    with assume_target(Target("cpu")):
        assert op.choose(2)[1] == op.choose(3)[1] == {"kernel": "no kernels for cpu"}
    with assume_target(Target("cuda")):
        assert op(2) == ("kernel", 2)
        assert op.choose(3)[1] == {"kernel": "x is odd"}


def test_one_on_request_serves_only_calls_that_name_or_prefer_it(op: Op) -> None:
    op.register(implementation("example"), on_request=True)
    assert op.names == ("xla", "example")
    assert op(3) == ("xla", 3)
    assert op(3, implementation="example") == ("example", 3)
    with prefer("example"):
        assert op(3) == ("example", 3)
    with pytest.raises(ValueError, match="already has"):
        op.register(implementation("example"), on_request=True)


def test_one_that_would_be_slower_serves_only_calls_that_name_or_prefer_it(op: Op) -> None:
    slower = Implementation("kernel", lambda x: ("kernel", x), slower=lambda x: "2 ms, others 1" if x > 5 else None)
    op.register(slower)
    assert op(3) == ("kernel", 3) and op(6) == ("xla", 6)
    assert op.choose(6)[1] == {"kernel": "2 ms, others 1"}
    assert op(6, implementation="kernel") == ("kernel", 6)
    with prefer("kernel"):
        assert op(6) == ("kernel", 6)


def test_one_that_takes_long_to_compile_is_passed_over_where_layers_are_of_many_kinds(op: Op) -> None:
    op.register(Implementation("kernel", lambda x: ("kernel", x), most_kinds=4))
    with of_kinds(4):
        assert op(3) == ("kernel", 3)
    with of_kinds(5):
        assert op(3) == ("xla", 3) and "5 kinds of layers" in op.choose(3)[1]["kernel"]
        assert op(3, implementation="kernel") == ("kernel", 3)
        with prefer("kernel"):
            assert op(3) == ("kernel", 3)
    assert op(3) == ("kernel", 3)


def test_one_that_is_whole_gives_way_to_kernels_of_other_ops(op: Op) -> None:
    op.register(Implementation("parts", lambda x: x + 1))
    op.register(Implementation("one_kernel", lambda x: x + 2, whole=True))
    assert op.choose(1)[0].name == "one_kernel"
    for name, chosen in (("of_another_op", "parts"), ("parts", "parts"), ("one_kernel", "one_kernel"), ("xla", "xla")):
        with prefer(name):
            assert op.choose(1)[0].name == chosen
    with prefer("of_another_op"):
        assert op.choose(1, implementation="one_kernel")[0].name == "one_kernel"
        assert "of_another_op is preferred" in op.choose(1)[1]["one_kernel"]


def test_what_is_preferred_is_tried_first_and_the_rest_keeps_its_order(op: Op) -> None:
    op.register(implementation("slow"))
    op.register(implementation("even", lambda x: "x is odd" if x % 2 else None))
    with prefer("slow"):
        assert op(2) == ("slow", 2)
        with prefer("xla"):
            assert op(2) == ("xla", 2)
        assert op(2) == ("slow", 2)
    with prefer("even"):
        assert op(3) == ("slow", 3)
    with prefer(None):
        assert op(2) == ("even", 2)


def test_a_record_tells_what_ran_and_why_others_did_not(op: Op) -> None:
    op.register(implementation("even", lambda x: "x is odd" if x % 2 else None))
    used: Record = {}
    with record(used):
        for x in (2, 3, 5):
            op(x)
    op(7, implementation="xla")
    assert used == {"twice": {"even": set(), "xla": {"even: x is odd"}}}


def test_the_default_target_is_the_default_device() -> None:
    assert target().platform == jax.default_backend()
    assert target().interpret is False


def test_attention_of_prompts_goes_to_the_library_first() -> None:
    assert ops()["attend"].names == ("cudnn", "hopper", "triton", "xla")
