"""How training is spread over devices: sharded `jit`, or `pmap`.

The step is written once. It calls its backend for this device's shard of a batch and for the mean
over devices. Under `jit` the compiler sees the global batch, so a shard is a sharding constraint
and a mean is a no-op; under `pmap` they are a slice and a collective. Both train alike: the same
draws for the same images (augmentation, stochastic depth, dropout), the same BN statistics.

`pmap` is in maintenance mode since jax 0.8. It is here because people ask for it, and because it
tests the other backend.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from resjax.config import Config
from resjax.config import Parallel as ParallelConfig
from resjax.errors import UserError
from resjax.xla import target
from resjax.xla.compile_options import quick_compile


class Backend:
    """Sharded `jit` over a mesh of two axes: `data`, and `shard` for the parameters.

    The batch is sharded over both. With one device along `shard` every device holds all parameters;
    with more, each holds its shard of parameters and optimizer state (FSDP).

    `Pmap` overrides every public method.

    Attributes:
      devices: number of devices of all processes.
    """

    AXES = ("data", "shard")

    def __init__(self, config: ParallelConfig, part_size: int):
        """Finds the devices; `part_size` is the global number of images per forward pass."""
        found = target.devices()
        self.devices = len(found)
        self._shards = config.shard_parameters
        if self.devices % self._shards:
            raise UserError(
                f"parallel.shard_parameters={self._shards} does not divide {self.devices} devices; "
                f"valid: {', '.join(map(str, _divisors(self.devices)))}"
            )
        shape = (self.devices // self._shards, self._shards)
        self.mesh = jax.make_mesh(shape, self.AXES, axis_types=(AxisType.Auto,) * 2, devices=found)
        self._bn_groups = bn_groups(config, self.devices)

    # Inside a compiled function.

    def local_shard(self, tree: Any) -> Any:
        """Returns this device's part of arrays whose first axis is the global batch."""
        return lax.with_sharding_constraint(tree, self._sharding(self.AXES))

    def gather_batch(self, dataset: Any, indices: Int[Array, "batch"]) -> Any:
        """Returns this device's part of a batch from what `shard_dataset` returned."""
        gather = partial(_gather, axis=self.AXES, devices=self.devices)
        specs = (PartitionSpec(self.AXES), PartitionSpec())
        return jax.shard_map(gather, mesh=self.mesh, in_specs=specs, out_specs=specs[0])(
            dataset, indices
        )

    def gather_parameters(self, tree: Any) -> Any:
        """Returns parameters or their gradients whole on every device.

        Problem: from shards, XLA computes shards of the activations, channel by channel, and sends
        activations and sums between devices in every layer. Effect of gathering the parameters
        first, as in FSDP: they and their gradients are all that is sent.
        """
        return lax.with_sharding_constraint(tree, self._sharding()) if self._shards > 1 else tree

    def mean(self, tree: Any) -> Any:
        """Averages over devices what each computed from its shard."""
        return tree

    def sum(self, tree: Any) -> Any:
        """Sums over devices what each computed from its shard."""
        return tree

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """Returns a key that draws, for this device's images, what the global batch would get."""
        return key

    # Around compiled functions.

    def norm_options(self) -> dict[str, Any]:
        """Returns the fields of `BatchNorm` that say which devices share statistics."""
        return {"groups": self._bn_groups}

    def shard_dataset(self, tree: Any) -> Any:
        """Places a dataset's arrays; each device holds a part of the examples."""
        sharding = self._sharding(self.AXES)
        return jax.tree.map(
            lambda leaf: target.place(_pad_examples(leaf, self.devices), sharding), tree
        )

    def place_batches(self, tree: Any) -> Any:
        """Places batches (parts, batch, ...), of which this host has (parts, its share, ...)."""
        sharding = self._sharding(None, self.AXES)
        if target.described_target():
            return jax.tree.map(lambda leaf: target.place(leaf, sharding), tree)
        return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)

    def unreplicate(self, state: Any) -> Any:
        """Returns a state as a checkpoint holds it, without the copies of `pmap`."""
        return state

    def replicate(self, state: Any) -> Any:
        """Places a state that a checkpoint holds; the inverse of `unreplicate`."""
        return state

    def compile_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `init(key) -> state`; the state is replicated already.

        If the devices are only described, both `init` functions return shapes and shardings.
        """
        layout = self._state_sharding(jax.eval_shape(init, jax.random.key(0)))
        return _or_shapes(jax.jit(init, out_shardings=layout, compiler_options=quick_compile()))

    def compile_init_opt_state(self, init: Callable[[Any], Any], params: Any) -> Any:
        """Compiles `init(params) -> opt_state` for parameters of these shapes."""
        layout = jax.tree.map(self._param_sharding, jax.eval_shape(init, params))
        return _or_shapes(jax.jit(init, out_shardings=layout))

    def compile_steps(self, function: Callable[..., Any]) -> Any:
        """Compiles `function(state, arrays) -> (state, metrics)`; the state is donated."""

        def constrained(state: Any, arrays: Any) -> Any:
            new, metrics = function(state, arrays)
            replicated = jax.tree.map(lambda _: self._sharding(), metrics)
            sharding = (self._state_sharding(new), replicated)
            return lax.with_sharding_constraint((new, metrics), sharding)

        return jax.jit(constrained, donate_argnums=0)

    def compile_measure(self, function: Callable[..., Any]) -> Any:
        """Compiles `function(state, arrays) -> metrics`, such as an evaluation."""
        return jax.jit(function, out_shardings=self._sharding())

    def _sharding(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _state_sharding(self, state: Any) -> Any:
        """Shards parameters and optimizer state, and replicates the rest."""
        sharding = jax.tree.map(lambda _: self._sharding(), state)
        sharded = {
            name: jax.tree.map(self._param_sharding, getattr(state, name))
            for name in ("params", "opt_state", "ema")
        }
        return sharding._replace(**sharded)

    def _param_sharding(self, leaf: Any) -> NamedSharding:
        for axis in reversed(range(leaf.ndim)):
            if self._shards > 1 and leaf.shape[axis] % self._shards == 0:
                return self._sharding(*[None] * axis, "shard")
        return self._sharding()


class Pmap(Backend):
    """`pmap` over all devices; every device holds a replica of the state."""

    AXIS = "batch"

    def __init__(self, config: ParallelConfig, part_size: int):
        if config.shard_parameters > 1:
            raise UserError(
                f"parallel.shard_parameters={config.shard_parameters} needs parallel.backend=jit"
            )
        self.devices = len(target.devices())
        self._local = Mesh(np.array(target.local_devices()), (self.AXIS,))
        self._mapped = NamedSharding(self._local, PartitionSpec(self.AXIS))
        self._norm_group = _norm_devices(config, self.devices)
        self._sharded_draws = _sharded_draws(part_size // self.devices, self.devices, self.AXIS)

    def local_shard(self, tree: Any) -> Any:
        def own(whole: Array) -> Array:
            size = len(whole) // self.devices
            return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.AXIS) * size, size)

        return jax.tree.map(own, tree)

    def gather_batch(self, dataset: Any, indices: Int[Array, "batch"]) -> Any:
        return _gather(dataset, indices, axis=self.AXIS, devices=self.devices)

    def gather_parameters(self, tree: Any) -> Any:
        return tree

    def mean(self, tree: Any) -> Any:
        return lax.pmean(tree, self.AXIS)

    def sum(self, tree: Any) -> Any:
        return lax.psum(tree, self.AXIS)

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        return jax.random.wrap_key_data(jax.random.key_data(key), impl=self._sharded_draws)

    def norm_options(self) -> dict[str, Any]:
        if self._norm_group == 1:
            return {}
        if self._norm_group == self.devices:
            return {"axis_name": self.AXIS}
        groups = np.arange(self.devices).reshape(-1, self._norm_group).tolist()
        return {"axis_name": self.AXIS, "axis_index_groups": groups}

    def shard_dataset(self, tree: Any) -> Any:
        first = jax.process_index() * self._local.size

        def own(leaf: np.ndarray) -> Array:
            filled = _pad_examples(leaf, self.devices)
            parts = filled.reshape(self.devices, -1, *leaf.shape[1:])
            return target.place(parts[first : first + self._local.size], self._mapped)

        return jax.tree.map(own, tree)

    def place_batches(self, tree: Any) -> Any:
        def own(leaf: np.ndarray) -> Array:
            parts = leaf.reshape(len(leaf), self._local.size, -1, *leaf.shape[2:])
            return target.place(parts.swapaxes(0, 1), self._mapped)

        return jax.tree.map(own, tree)

    def unreplicate(self, state: Any) -> Any:
        first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], state)
        if jax.process_count() == 1:
            return first
        # Orbax saves arrays that are global and replicated over all processes.
        together = NamedSharding(Mesh(np.array(jax.devices()), (self.AXIS,)), PartitionSpec())
        return jax.tree.map(lambda leaf: _to_global(leaf, together), first)

    def replicate(self, state: Any) -> Any:
        if target.described_target():
            return self._mapped_shapes(jax.eval_shape(partial(jax.tree.map, self._copies), state))
        # A restored state is committed to one device.
        here = NamedSharding(self._local, PartitionSpec())
        state = jax.device_put(jax.tree.map(_addressable, state), here)

        @partial(jax.jit, out_shardings=self._mapped)
        def copies(tree: Any) -> Any:
            return jax.tree.map(self._copies, tree)

        return copies(state)

    def _copies(self, leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (self._local.size, *leaf.shape))

    def compile_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        once = _or_shapes(jax.jit(init, compiler_options=quick_compile()))
        return lambda key: self.replicate(once(key))

    def compile_init_opt_state(self, init: Callable[[Any], Any], params: Any) -> Any:
        compiled = self._pmap(init)
        if target.described_target():
            return lambda params: self._mapped_shapes(jax.eval_shape(compiled, params))
        return compiled

    def compile_steps(self, function: Callable[..., Any]) -> Any:
        return self._pmap(function, out_axes=(0, None), donate_argnums=0)

    def compile_measure(self, function: Callable[..., Any]) -> Any:
        return self._pmap(function, out_axes=None)

    def _pmap(self, function: Callable[..., Any], **options: Any) -> Any:
        found = target.described_target()
        return jax.pmap(function, self.AXIS, devices=found and found.devices, **options)

    def _mapped_shapes(self, tree: Any) -> Any:
        def mapped(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._mapped)

        return jax.tree.map(mapped, tree)


def make_backend(config: Config) -> Backend:
    """Returns the backend of a config, on all devices that JAX finds.

    Raises:
      UserError: the batch, or a group of devices that shares BN statistics, does not divide.
    """
    cls = Backend if config.parallel.backend == "jit" else Pmap
    made = cls(config.parallel, config.data.batch_size // config.train.accumulation_steps)
    unit = batch_unit(config, made.devices)
    if rest := config.data.batch_size % unit:
        below = config.data.batch_size - rest
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        parts = f"{made.devices} devices"
        if config.train.accumulation_steps > 1:
            parts += f" and {config.train.accumulation_steps} accumulated parts"
        if config.data.mixup or config.data.cutmix:
            parts += ", into pairs of images to mix"
        fewer = [
            str(n)
            for n in range(1, made.devices)
            if not config.data.batch_size % batch_unit(config, n)
        ]
        fitting = f"; numbers of devices that divide it: {', '.join(fewer)}" if fewer else ""
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide among {parts}; "
            f"nearest: {near}{fitting}"
        )
    return made


def batch_unit(config: Config, devices: int) -> int:
    """Returns the number of which every valid batch size is a multiple."""
    mixes = config.data.mixup or config.data.cutmix  # neighbors, on one device and in one part
    return devices * config.train.accumulation_steps * (2 if mixes else 1)


def bn_groups(config: ParallelConfig, devices: int) -> int:
    """Returns the number of equal parts of a batch that have BN statistics of their own.

    Raises:
      UserError: `parallel.bn_devices` does not divide the number of devices.
    """
    return devices // _norm_devices(config, devices)


def device_memory() -> int | None:
    """Returns the bytes that a run may use on one device, or None if they are not known.

    On an accelerator it is the limit of its allocator. On a CPU it is what system and container
    have left, divided by the number of devices; only Linux says it.
    """
    if described := target.described_target():
        return described.memory
    if statistics := jax.local_devices()[0].memory_stats():
        return statistics.get("bytes_limit")
    if jax.default_backend() != "cpu" or not (system := Path("/proc/meminfo")).is_file():
        return None
    available = [1024 * int(re.findall(r"MemAvailable:\s+(\d+)", system.read_text())[0])]
    container = Path("/sys/fs/cgroup")  # version 2
    if (most := container / "memory.max").is_file() and (text := most.read_text().strip()) != "max":
        available.append(int(text) - int((container / "memory.current").read_text()))
    return min(available) // jax.local_device_count()


def _or_shapes(jitted: Any) -> Any:
    """Returns a jitted function, or for described devices one that returns its results' shapes."""
    return jitted.eval_shape if target.described_target() else jitted


def _gather(dataset: Any, indices: Int[Array, "batch"], axis: Any, devices: int) -> Any:
    """Returns this device's part of the examples at `indices`.

    Every device looks up the whole batch among its own examples, with zeros for those of other
    devices; each then gets the sum of its part of the batch over all devices.
    """

    def gather(own: Array) -> Array:
        if devices == 1:
            return own[indices]
        position = indices - lax.axis_index(axis) * len(own)
        local = (position >= 0) & (position < len(own))
        found = own[jnp.clip(position, 0, len(own) - 1)]
        masked = jnp.where(local.reshape(-1, *[1] * (own.ndim - 1)), found, 0)
        return lax.psum_scatter(masked, axis, tiled=True)

    return jax.tree.map(gather, dataset)


def _sharded_draws(images: int, devices: int, axis: str) -> Any:
    """Returns a PRNG implementation that draws a device's part of what the global batch gets.

    A draw with one entry for each of a device's `images`, such as a mask of dropout, is its part of
    a draw for the images of all devices. Any other draw is the same on every device. Both are what
    the same module draws under sharded `jit`, so it need not know how the batch is spread.
    """

    def through_default(function: Callable[..., Array]) -> Callable[..., Array]:
        def on_data(data: Array, *arguments: Any) -> Array:
            return jax.random.key_data(function(jax.random.wrap_key_data(data), *arguments))

        return on_data

    def random_bits(data: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
        draw = partial(jax.random.bits, jax.random.wrap_key_data(data), dtype=f"uint{bit_width}")
        if not shape or shape[0] != images:
            return draw(shape)
        whole = draw((devices * images, *shape[1:]))
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(axis) * images, images)

    return define_prng_impl(
        key_shape=jax.random.key_data(jax.random.key(0)).shape,
        seed=lambda seed: jax.random.key_data(jax.random.key(seed)),
        split=through_default(jax.random.split),
        fold_in=through_default(jax.random.fold_in),
        random_bits=random_bits,
        name=f"part_of_{devices}",
        tag="part",
    )


def _pad_examples(leaf: np.ndarray, devices: int) -> np.ndarray:
    """Appends examples of zeros until all devices get the same number."""
    return np.pad(leaf, [(0, -len(leaf) % devices), *[(0, 0)] * (leaf.ndim - 1)])


def _to_global(leaf: Array, sharding: NamedSharding) -> Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_to_global(jax.random.key_data(leaf), sharding))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def _addressable(leaf: Any) -> Any:
    whole = not isinstance(leaf, Array) or leaf.is_fully_addressable
    return leaf if whole else leaf.addressable_shards[0].data


def _norm_devices(config: ParallelConfig, devices: int) -> int:
    together = config.bn_devices or devices
    if devices % together:
        raise UserError(
            f"parallel.bn_devices={together} does not divide {devices} devices; valid: "
            f"{', '.join(map(str, _divisors(devices)))}, and 0 for all"
        )
    return together


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
