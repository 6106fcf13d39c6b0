"""Counts of a compiled program: kernels, loops, arithmetic, memory traffic, collectives."""
# ruff: noqa: E501

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from resjax.xla.program import Program
from resjax.xla.topologies import GPUS, TPUS


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def flops(program):
    return sum(kernel.times * kernel.flops for kernel in program.kernels)


def convolve(x, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=numbers)


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    program = compiled(loop, (32, 64), (64, 64))
    assert flops(program) == 7 * 2 * 32 * 64 * 64
    assert {each.times for each in program.kernels if each.kind == "matrix product"} == {7}


def test_a_convolution_has_its_flops():
    program = compiled(convolve, (2, 16, 16, 8), (3, 3, 8, 4))
    assert flops(program) == 2 * 2 * 16 * 16 * 4 * 3 * 3 * 8


def test_zeros_between_the_pixels_of_a_strided_convolutions_gradient_cost_no_flops():
    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, stride=2) ** 2)

    program = compiled(jax.grad(loss), (2, 16, 16, 8), (3, 3, 8, 4))
    once = 2 * 2 * 8 * 8 * 4 * 3 * 3 * 8
    assert once < flops(program) <= 2.3 * once  # forward and backward, and the border


TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p: bf16[4,8,8,16], w: bf16[3,3,16,16]) -> (f32[16], bf16[4,8,8,16]) {
  %p = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %convolution.1 = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)} convolution(%p, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %zero = f32[]{:T(128)} constant(0)
  %total = f32[16]{0:T(128)} reduce(%convolution.1, %zero), dimensions={0,1,2}, to_apply=%add
  ROOT %both = (f32[16]{0:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)}) tuple(%total, %convolution.1)
}

%body (carry: (s32[], bf16[4,8,8,16], bf16[3,3,16,16])) -> (s32[], bf16[4,8,8,16], bf16[3,3,16,16]) {
  %carry = (s32[]{:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %k = bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %fusion.1 = (f32[16]{0:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}) fusion(%x, %k), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/conv"}, backend_config={"window_config":{"estimated_cycles":"3000"}}
  %sums = f32[16]{0:T(128)} get-tuple-element(%fusion.1), index=0
  %y = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.1), index=1
  %all-reduce.1 = f32[16]{0:T(128)} all-reduce(%sums), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)}) tuple(%next, %y, %k)
}

%condition (carry: (s32[], bf16[4,8,8,16], bf16[3,3,16,16])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[4,8,8,16], k: bf16[3,3,16,16]) -> bf16[4,8,8,16] {
  %x.1 = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %fast = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %zero.1 = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)}) tuple(%zero.1, %fast, %k.1)
  %while = (s32[]{:T(128)}, bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  %done = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while), index=1
  ROOT %copy.2 = bf16[4,8,8,16]{3,2,1,0:T(8,128)(2,1)} copy(%done)
}
"""


@pytest.fixture(scope="module")
def tpu():
    """The kernels of a program in the format of the TPU's compiler, by kind."""
    return {kernel.kind: kernel for kernel in Program(TPU).kernels}


def test_the_kinds_of_a_tpus_kernels(tpu):
    assert list(tpu) == ["prefetch", "scalar", "convolution", "collective", "copy"]
    times = {kind: kernel.times for kind, kernel in tpu.items()}
    assert times == {"prefetch": 1, "scalar": 5, "convolution": 5, "collective": 5, "copy": 1}


def test_a_fused_convolution_has_its_types_flops_and_cycles(tpu):
    kernel = tpu["convolution"]
    assert kernel.dtypes == ("bf16",)
    assert kernel.flops == 2 * 4 * 8 * 8 * 16 * 3 * 3 * 16
    assert kernel.cycles == 3000
    assert kernel.source == "jit(f)/conv"


def test_cycles_that_the_compiler_does_not_know_are_left_out():
    unknown = TPU.replace('"estimated_cycles":"3000"', '"estimated_cycles":"9223372036854775807"')
    without = TPU.replace('"estimated_cycles":"3000"', "")
    assert Program(unknown).kernels == Program(without).kernels


def test_traffic_is_padded_to_tiles_and_leaves_out_fast_memory(tpu):
    images = 4 * 8 * 8 * 128 * 2  # 16 channels take the place of 128
    assert tpu["prefetch"].traffic == images
    assert tpu["copy"].traffic == images
    weights, sums = 3 * 3 * 16 * 128 * 2, 128 * 4
    assert tpu["convolution"].traffic == weights + sums


def test_a_collective_sends_its_results_without_padding(tpu):
    assert tpu["collective"].sent == 16 * 4


def test_the_predicted_time_is_that_of_the_longest_limit_of_each_kernel(tpu):
    chip = TPUS["v5e"]
    copied = tpu["copy"].traffic / chip.bandwidth
    reduced = tpu["collective"].traffic / chip.bandwidth + chip.latency + 64 / chip.link
    expected = copied + 5 * (3000 / chip.clock + reduced)
    assert Program(TPU).seconds(chip, "bfloat16") == pytest.approx(expected)


SLICES = """\
HloModule jit_f, is_scheduled=true

%%slicing (all: f32[9,8,128], row: s32[]) -> f32[8,128] {
  %%all.2 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %%row.2 = s32[]{:T(128)} parameter(1)
  %%zero = s32[]{:T(128)} constant(0)
  %%slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%%all.2, %%row.2, %%zero, %%zero), dynamic_slice_sizes={1,8,128}
  ROOT %%one = f32[8,128]{1,0:T(8,128)} bitcast(%%slice)
}

%%fused (all: f32[9,8,128], row: s32[]) -> f32[8,128] {
  %%all.1 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %%row.1 = s32[]{:T(128)} parameter(1)
  %%flat = f32[9,8,128]{2,1,0:T(8,128)} bitcast(%%all.1)
  %%inner = f32[8,128]{1,0:T(8,128)} fusion(%%flat, %%row.1), kind=kLoop, calls=%%slicing
  %s
}

ENTRY %%main (all: f32[9,8,128], row: s32[]) -> f32[8,128] {
  %%all = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %%row = s32[]{:T(128)} parameter(1)
  ROOT %%fusion = f32[8,128]{1,0:T(8,128)} fusion(%%all, %%row), kind=kLoop, calls=%%fused
}
"""


@pytest.mark.parametrize(
    ("root", "read"),
    [
        ("ROOT %out = f32[8,128]{1,0:T(8,128)} negate(%inner)", 1),
        ("ROOT %out = f32[8,128]{1,0:T(8,128)} custom-call(%inner, %all.1)", 9),
    ],
    ids=["a slice", "the whole array"],
)
def test_a_slice_of_an_array_counts_alone_also_in_a_fusion_within_a_fusion(root, read):
    [kernel] = Program(SLICES % root).kernels
    row, index = 8 * 128 * 4, 4
    assert kernel.traffic == read * row + row + index


TILING = """\
HloModule jit_f, is_scheduled=true

%retile (all: f32[9,8,128]) -> f32[9,8,128] {
  %all.2 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %copy = f32[9,8,128]{2,1,0:T(4,128)} copy(%all.2)
}

%fused (all: f32[9,8,128], row: s32[], new: f32[1,8,128]) -> f32[9,8,128] {
  %all.1 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %row.1 = s32[]{:T(128)} parameter(1)
  %new.1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  %tiled = f32[9,8,128]{2,1,0:T(4,128)} fusion(%all.1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  %zero = s32[]{:T(128)} constant(0)
  ROOT %out = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%tiled, %new.1, %row.1, %zero, %zero)
}

ENTRY %main (all: f32[9,8,128], row: s32[], new: f32[1,8,128]) -> f32[9,8,128] {
  %all = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %row = s32[]{:T(128)} parameter(1)
  %new = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  ROOT %fusion = f32[9,8,128]{2,1,0:T(8,128)} fusion(%all, %row, %new), kind=kLoop, calls=%fused
}
"""


def test_an_update_of_a_slice_counts_alone_also_if_the_array_has_another_tiling():
    [kernel] = Program(TILING).kernels
    row, index = 8 * 128 * 4, 4
    assert kernel.traffic == 2 * row + row + index  # the slice is read too, as for every update


GPU = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[8,32,32,16], dy: bf16[8,16,16,32]) -> bf16[32,3,3,16] {
  %x.1 = bf16[8,32,32,16]{3,2,1,0} parameter(0)
  %dy.1 = bf16[8,16,16,32]{3,2,1,0} parameter(1)
  %conv = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %dy.1), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %gradient = bf16[32,3,3,16]{3,2,1,0} get-tuple-element(%conv), index=0
}
"""


def test_a_gradient_by_cudnn_has_the_flops_of_the_forward_convolution():
    [kernel] = Program(GPU).kernels
    assert kernel.kind == "convolution"
    assert kernel.flops == 2 * 8 * 16 * 16 * 32 * 3 * 3 * 16
    assert kernel.traffic == 2 * (8 * 32 * 32 * 16 + 8 * 16 * 16 * 32 + 32 * 3 * 3 * 16)


def test_a_small_kernel_takes_a_launch_on_a_gpu():
    assert Program(GPU).seconds(GPUS["h100"], "bfloat16") == GPUS["h100"].launch


ONE_KERNEL = """\
HloModule jit_f, is_scheduled=true

%%add (x: f32[], y: f32[]) -> f32[] {
  %%x = f32[] parameter(0)
  %%y = f32[] parameter(1)
  ROOT %%sum = f32[] add(%%x, %%y)
}

%%update (all: f32[9,8,128], new: f32[8,128], row: s32[]) -> f32[9,8,128] {
  %%all.1 = f32[9,8,128]{2,1,0} parameter(0)
  %%new.1 = f32[8,128]{1,0} parameter(1)
  %%slice = f32[1,8,128]{2,1,0} bitcast(%%new.1)
  %%row.1 = s32[] parameter(2)
  %%zero = s32[] constant(0)
  ROOT %%out = f32[9,8,128]{2,1,0} dynamic-update-slice(%%all.1, %%slice, %%row.1, %%zero, %%zero)
}

ENTRY %%main (all: f32[9,8,128], new: f32[8,128], row: s32[]) -> f32[9,8,128] {
  %%all = f32[9,8,128]{2,1,0} parameter(0)
  %%new = f32[8,128]{1,0} parameter(1)
  %%row = s32[] parameter(2)
  %s
}
"""
ASYNCHRONOUS = {
    "fusion": (
        "f32[9,8,128]{2,1,0}",
        "((f32[9,8,128]{2,1,0}, f32[8,128]{1,0}, s32[]), f32[9,8,128]{2,1,0}, u32[])",
        "(%all, %new, %row), kind=kLoop, calls=%update",
    ),
    "reduce-scatter": (
        "f32[2,128]{1,0}",
        "((f32[8,128]{1,0}), f32[2,128]{1,0})",
        "(%new), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add",
    ),
    "all-gather": (
        "f32[32,128]{1,0}",
        "(f32[8,128]{1,0}, f32[32,128]{1,0})",
        "(%new), replica_groups={{0,1,2,3}}, dimensions={0}",
    ),
    "all-gather of two": (
        "(f32[32,128]{1,0}, f32[36,8,128]{2,1,0})",
        "((f32[8,128]{1,0}, f32[9,8,128]{2,1,0}), (f32[32,128]{1,0}, /*index=1*/f32[36,8,128]{2,1,0}))",
        "(%new, %all), replica_groups={{0,1,2,3}}, dimensions={0}",
    ),
    "all-reduce of two": (
        "(f32[8,128]{1,0}, f32[9,8,128]{2,1,0})",
        "(f32[8,128]{1,0}, f32[9,8,128]{2,1,0})",
        "(%new, %all), replica_groups={{0,1,2,3}}, to_apply=%add",
    ),
    "collective-permute": (
        "f32[8,128]{1,0}",
        "(f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[])",
        "(%new), source_target_pairs={{0,1},{1,0}}",
    ),
}


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_an_asynchronous_kernel_counts_once_and_like_a_synchronous_one(name):
    result, started, rest = ASYNCHRONOUS[name]
    opcode = name.partition(" ")[0]
    [expected] = Program(ONE_KERNEL % f"ROOT %kernel = {result} {opcode}{rest}").kernels
    text = (
        f"%kernel = {started} {opcode}-start{rest}\n  ROOT %done = {result} {opcode}-done(%kernel)"
    )
    [kernel] = Program(ONE_KERNEL % text).kernels
    assert kernel == expected
    assert kernel.traffic > 0
    assert (kernel.sent > 0) == (kernel.kind == "collective")


def test_a_slice_that_is_moved_into_fast_memory_counts_alone():
    start = "((f32[9,8,128]{2,1,0}), f32[2,8,128]{2,1,0:S(1)}, s32[]) slice-start(%all), slice={[0:2], [0:8], [0:128]}"
    done = "f32[2,8,128]{2,1,0:S(1)} slice-done(%start)"
    [kernel] = Program(ONE_KERNEL % f"%start = {start}\n  ROOT %done = {done}").kernels
    assert kernel.kind == "prefetch"
    assert kernel.traffic == 2 * 8 * 128 * 4


ON_A_TPU = """
%%start (shard: f32[8,128]) -> (f32[8,128], f32[32,128], u32[]) {
  %%shard = f32[8,128]{1,0:T(8,128)} parameter(0)
  %%all-gather.1 = f32[32,128]{1,0:T(8,128)} all-gather(%%shard), channel_id=1, dimensions={0}, metadata={op_name="jit(f)/gather"}
  ROOT %%started = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%%advance (other: f32[8,128], shard.1: f32[8,128]) -> (f32[8,128], f32[32,128]) {
  %%other = f32[8,128]{1,0:T(8,128)} parameter(0)
  %%shard.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %%doubled = f32[8,128]{1,0:T(8,128)} add(%%other, %%other)
  %%gathered.2 = f32[32,128]{1,0:T(8,128)S(1)} all-gather(%%shard.1), channel_id=1, dimensions={0}
  ROOT %%both = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)S(1)}) tuple(%%doubled, %%gathered.2)
}

%%end (shard.2: f32[8,128]) -> f32[32,128] {
  %%shard.2 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %%gathered.3 = f32[32,128]{1,0:T(8,128)S(1)} all-gather(%%shard.2), channel_id=1, dimensions={0}
  ROOT %%ended = f32[32,128]{1,0:T(8,128)S(1)} custom-call(%%shard.2, %%gathered.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %%main (mine: f32[8,128], next: f32[8,128]) -> f32[32,128] {
  %%mine = f32[8,128]{1,0:T(8,128)} parameter(0)
  %%next = f32[8,128]{1,0:T(8,128)} parameter(1)
  %s
}
"""


def test_a_collective_that_advances_within_kernels_of_a_tpu_counts_once():
    gather = 'ROOT %all-gather.1 = f32[32,128]{1,0:T(8,128)S(1)} all-gather(%mine), channel_id=1, dimensions={0}, metadata={op_name="jit(f)/gather"}'
    [expected] = Program(ON_A_TPU % gather).kernels
    fused = "\n  ".join(
        [
            "%all = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) fusion(%mine), kind=kCustom, calls=%start",
            "%part = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)S(1)}) fusion(%next, %mine), kind=kCustom, calls=%advance",
            "ROOT %whole = f32[32,128]{1,0:T(8,128)S(1)} fusion(%mine), kind=kCustom, calls=%end",
        ]
    )
    first, part = Program(ON_A_TPU % fused).kernels
    assert first == expected
    assert (first.kind, first.sent, first.source) == ("collective", 32 * 128 * 4, "jit(f)/gather")
    assert part.kind == "other"
