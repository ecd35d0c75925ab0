"""The interpreter itself, on a few lines of PTX: what it computes, and that it finds each kind of fault."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_exchange import product
from ptx_machine import Machine
from ptx_memory import Fault, GlobalMemory
from ptx_program import kernels

THREADS = 64

# Each thread has its number in %r1, its place in the output in %rd1 and in shared memory in %r2, four bytes a thread.
MODULE = """
.visible .entry one(
	.param .u64 one_param_0
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<4>;
	.reg .b32 	%r<12>;
	.reg .f32 	%f<4>;
	.reg .b64 	%rd<8>;
	.shared .align 16 .b8 room[256];

	ld.param.u64 	%rd0, [one_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd1, %rd0, %rd2;
	shl.b32 	%r2, %r1, 2;
	BODY
	ret;

}
"""


def run(*body: str, blocks: int = 1, output: int = 4 * THREADS) -> tuple[Machine, np.ndarray]:
    """Runs the lines and returns the machine and the output as int32."""
    kernel = kernels(MODULE.replace("BODY", "\n\t".join(body)))["one"]
    memory = GlobalMemory(1 << 16)
    place = memory.room("output", output)
    machine = Machine(kernel, memory, [place.to_bytes(8, "little")]).run((blocks, 1, 1))
    return machine, memory.read(place, np.int32, output // 4)


STORE = "st.global.u32 [%rd1], %r3;"


def value(*body: str) -> int:
    """What thread 5 leaves in %r3."""
    machine, output = run(*body, STORE)
    assert not machine.found
    return int(output[5])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (("add.s32 %r3, %r1, -7;",), -2),
        (("mov.u32 %r4, -17;", "shr.s32 %r3, %r4, 40;"), -1),
        (("mov.u32 %r4, 17;", "shr.u32 %r3, %r4, 40;"), 0),
        (("mov.u64 %rd3, -17;", "mov.u64 %rd4, 5;", "div.s64 %rd5, %rd3, %rd4;", "cvt.u32.u64 %r3, %rd5;"), -3),
        (("mov.u32 %r4, 0x44332211;", "mov.u32 %r5, 0x08776655;", "prmt.b32 %r3, %r4, %r5, 0x7410;"), 0x08552211),
        (("mov.u32 %r4, 255;", "mov.u32 %r5, 0;", "bfi.b32 %r3, %r4, %r5, 4, 3;"), 0x70),
        (("mov.f32 %f1, 0f3F808000;", "cvt.rn.bf16.f32 %rs1, %f1;", "cvt.u32.u16 %r3, %rs1;"), 0x3F80),
        (("mov.f32 %f1, 0f3F800000;", "mov.f32 %f2, 0f40000000;", "cvt.rn.bf16x2.f32 %r3, %f1, %f2;"), 0x3F804000),
        (("setp.gt.s32 %p1, %r1, 4;", "selp.b32 %r3, 1, 2, %p1;"), 1),
        (("mov.b32 %r4, 0x00020001;", "mov.b32 {%rs1, %rs2}, %r4;", "cvt.u32.u16 %r3, %rs2;"), 2),
        (("shfl.sync.bfly.b32 %r3|%p1, %r1, 3, 31, -1;",), 5 ^ 3),
        (("mad.lo.s32 %r3, %r1, 10, -1;",), 49),
    ],
)  # fmt: skip
def test_values(body: tuple[str, ...], expected: int) -> None:
    assert value(*body) == expected


def words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Pairs of small integers as fp16, a word a lane."""
    halves = [values.astype(np.float16).view(np.uint16).astype(np.uint32) for values in (low, high)]
    return (halves[0] | halves[1] << 16)[None]


def test_tensor_core_product() -> None:
    """The fragments' places, against a product of whole matrices."""
    random, lanes = np.random.default_rng(0), np.arange(32)
    left, right = random.integers(-8, 8, (16, 16)), random.integers(-8, 8, (16, 8))
    row, column = lanes // 4, 2 * (lanes % 4)
    a = [words(left[row + i, column + j], left[row + i, column + j + 1]) for j in (0, 8) for i in (0, 8)]
    b = [words(right[column + j, row], right[column + j + 1, row]) for j in (0, 8)]
    c = [np.zeros((1, 32), np.float32)] * 4
    got, whole = product(a, b, c, bf16=False), left @ right
    for i, (down, along) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        assert np.array_equal(got[i][0], whole[row + down, column + along])


OTHER_WARP = ("xor.b32 %r4, %r2, 128;",)  # the place of the same lane of the other warp
NEIGHBOUR = ("xor.b32 %r4, %r2, 4;",)
FIRST_SEVEN = ("setp.lt.s32 %p1, %r1, 7;",)  # threads, by %p1


@pytest.mark.parametrize("place", [OTHER_WARP, NEIGHBOUR])
def test_a_barrier_orders_a_block(place: tuple[str, ...]) -> None:
    exchange = ("st.shared.u32 [%r2], %r1;", "bar.sync 0;", *place, "ld.shared.u32 %r3, [%r4];")
    assert value(*exchange) in (4, 37)
    machine, _ = run(*(line for line in exchange if "bar" not in line), STORE)
    assert any("wrote it without" in what for what in machine.found)


def test_a_warp_barrier_orders_its_warp_only() -> None:
    exchange = ("st.shared.u32 [%r2], %r1;", "bar.warp.sync -1;", "PLACE", "ld.shared.u32 %r3, [%r4];", STORE)
    near, _ = run(*(NEIGHBOUR[0] if line == "PLACE" else line for line in exchange))
    far, _ = run(*(OTHER_WARP[0] if line == "PLACE" else line for line in exchange))
    assert not near.found and any("another warp" in what for what in far.found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (("ld.shared.u32 %r3, [%r2];",), "reads what nobody wrote"),
        (("ld.global.u32 %r3, [%rd1];",), "reads what nobody wrote"),
        (("st.shared.u32 [room], %r1;",), "two lanes write one place"),
        (("st.global.u32 [%rd0], %r1;",), "two lanes write one byte"),
        ((*FIRST_SEVEN, "@%p1 bra $OUT;", "bar.sync 0;", "bra $END;", "$OUT:", "bar.sync 0;", "$END:"), "different"),
        (("cp.async.cg.shared.global [room], [%rd0], 16, 0;",), "never waited for"),
    ],
)  # fmt: skip
def test_findings(body: tuple[str, ...], message: str) -> None:
    machine, _ = run(*body)
    assert any(message in what for what in machine.found), machine.found


def test_blocks_share_no_output() -> None:
    assert any("another block wrote it" in what for what in run("mov.u32 %r3, 1;", STORE, blocks=2)[0].found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (("st.global.u32 [%rd1+4], %r1;",), "outside every allocation"),
        (("st.global.u32 [%rd1+2], %r1;",), "misaligned"),
        (("st.shared.u32 [%r2+128], %r1;",), "outside shared memory"),
        ((*FIRST_SEVEN, "@%p1 ret;", "shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;"), "never come"),
        (("frob.u32 %r3, %r1;",), "not transcribed"),
    ],
)
def test_what_a_card_would_stop_at(body: tuple[str, ...], message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(*body)
