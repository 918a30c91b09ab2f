"""Settings of devices and process groups. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_automodel.shared.errors import ConfigError, did_you_mean
from nemo_automodel.shared.memory_policies import RECOMPUTE_POLICIES

STRATEGIES = ("fsdp2", "megatron_fsdp", "megatron-fsdp", "mfsdp", "ddp")


@dataclass(frozen=True)
class DistEnvConfig:
    """The ``dist_env:`` section."""

    backend: str = "nccl"
    timeout_minutes: float = 1
    init_method: str | None = None


@dataclass(frozen=True)
class DistributedConfig:
    """The ``distributed:`` section. Data parallel for now: every other size above 1 is refused."""

    strategy: str = "fsdp2"
    dp_size: int | None = None
    dp_replicate_size: int | None = None
    tp_size: int | None = 1
    pp_size: int | None = 1
    cp_size: int | None = 1
    ep_size: int | None = 1
    activation_checkpointing: bool | str = False
    """``false``, ``true`` or ``full`` (every layer is recomputed), ``selective`` (matrix products are kept), or, of
    fast layers only, ``fp8_gate_up``, ``sac2``, ``sac1``, ``full_offload``."""
    mlp_tile_tokens: int | None = None
    """Tokens that the MLP of a fast layer works on at a time; null: all."""
    activation_checkpointing_scope: str | list[str] = "all"
    sequence_parallel: bool = False
    tp_plan: Any = None
    patch_is_packed_sequence: bool = False
    mp_policy: Any = None
    offload_policy: Any = None
    autocast_dtype: str | None = None
    """Compute in this dtype while the weights keep theirs: ``bfloat16`` over fp32 weights is mixed precision."""
    defer_fsdp_grad_sync: bool = True
    reshard_after_forward: bool | None = None
    enable_async_tensor_parallel: bool = False
    enable_compile: bool = False
    """Compile every decoder layer."""
    enable_fsdp2_prefetch: bool = False
    fsdp2_backward_prefetch_depth: int = 2
    fsdp2_forward_prefetch_depth: int = 1
    multimodal: Any = None
    pipeline: Any = None
    moe: Any = None
    # ddp
    broadcast_buffers: bool = False
    find_unused_parameters: bool = False
    static_graph: bool = False
    bucket_cap_mb: int | None = None
    gradient_as_bucket_view: bool = False
    # megatron_fsdp
    megatron_fsdp_unit_modules: Any = None
    zero_dp_strategy: int = 3
    init_fsdp_with_meta_device: bool = False
    grad_reduce_in_fp32: bool = False
    preserve_fp32_weights: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    check_for_nan_in_grad: bool = True
    report_nan_in_param_grad: bool = False
    average_in_collective: bool = False
    disable_bucketing: bool = False
    calculate_per_token_loss: bool = False
    keep_fp8_transpose_cache: bool = False
    nccl_ub: bool = False
    fsdp_double_buffer: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"`distributed.strategy: {self.strategy}` is not known.{did_you_mean(self.strategy, STRATEGIES)} "
                f"Known: {', '.join(STRATEGIES)}."
            )
        self.recompute_policy()
        tile = self.mlp_tile_tokens
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < 1):
            raise ConfigError(f"`distributed.mlp_tile_tokens: {tile}` is not a number of tokens. Use 1 or more.")

    def check_data_axis(self, num_processes: int) -> None:
        """Refuse data axes that do not take all processes of a run.

        Raises:
            ConfigError: they do not.
        """
        for key, sizes in (("dp_size", (None, num_processes)), ("dp_replicate_size", (None, 1, num_processes))):
            size = getattr(self, key)
            if size not in sizes:
                raise ConfigError(
                    f"`distributed.{key}` is {size}, but the run was started as {num_processes} process(es). Leave it "
                    f"out, or start the run with --nproc-per-node {size}"
                )

    def recompute_policy(self) -> str:
        """Return the name of a policy (`shared.memory_policies`) for every spelling of ``activation_checkpointing``."""
        spelling = str(self.activation_checkpointing).lower()
        if spelling in ("false", "off", "no", "disabled", "none"):
            return "none"
        if spelling in ("true", "on", "yes", "enabled", "full"):
            return "full"
        if spelling in RECOMPUTE_POLICIES:
            return spelling
        raise ConfigError(
            f"`distributed.activation_checkpointing: {self.activation_checkpointing}` is not known. "
            "Use false, selective or full, or on fast layers fp8_gate_up, sac2, sac1 or full_offload."
        )
