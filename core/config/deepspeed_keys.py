"""The keys that DeepSpeed's config knows, and what may stand there. A table; reads and decides nothing.

From https://www.deepspeed.ai/docs/config-json/ and the models of DeepSpeed 0.19.6 (runtime/config.py, runtime/zero/config.py,
runtime/zero/offload_config.py, runtime/precision_config.py). Inside of the objects named here DeepSpeed refuses a key it does not
know; on the outermost level it passes over it without a word.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Kind = str | tuple[str, ...]
"""`bool`, `int`, `number`, `text`, `object`, `any`, or the words to choose from."""

_TOP: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "train_batch_size": "int",
        "train_micro_batch_size_per_gpu": "int",
        "gradient_accumulation_steps": "int",
        "gradient_clipping": "number",
        "zero_optimization": "object",
        "zero_allow_untested_optimizer": "bool",
        "zero_force_ds_cpu_optimizer": "bool",
        "fp16": "object",
        "bf16": "object",
        "bfloat16": "object",
        "amp": "object",
        "torch_autocast": "object",
        "optimizer": "object",
        "scheduler": "object",
        "communication_data_type": "text",
        "seq_parallel_communication_data_type": "text",
        "prescale_gradients": "bool",
        "gradient_predivide_factor": "number",
        "gradient_allreduce_op": "text",
        "sparse_gradients": "bool",
        "disable_allgather": "bool",
        "graph_harvesting": "bool",
        "steps_per_print": "int",
        "wall_clock_breakdown": "bool",
        "memory_breakdown": "bool",
        "dump_state": "bool",
        "dataloader_drop_last": "bool",
        "vocabulary_size": "int",
        "log_level": "text",
        "managed_gradient_accumulation": "bool",
        **dict.fromkeys(
            (
                "activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger", "compile",
                "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types", "eigenvalue",
                "elasticity", "expert_parallel", "flops_profiler", "hybrid_engine", "nebula", "pipeline",
                "progressive_layer_drop", "quantize_training", "sparse_attention", "tensor_parallel", "tensorboard", "timers",
                "wandb", "weight_quantization", "zenflow",
            ),
            "any",
        ),
    }
)  # fmt: skip
_ZERO: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "stage": "int",
        "contiguous_gradients": "bool",
        "reduce_scatter": "bool",
        "reduce_bucket_size": "int",
        "use_multi_rank_bucket_allreduce": "bool",
        "allgather_partitions": "bool",
        "allgather_bucket_size": "int",
        "overlap_comm": "bool",
        "load_from_fp32_weights": "bool",
        "elastic_checkpoint": "bool",
        "offload_param": "object",
        "offload_optimizer": "object",
        "zenflow": "any",
        "sub_group_size": "int",
        "stage3_prefetch_bucket_size": "int",
        "stage3_param_persistence_threshold": "int",
        "stage3_model_persistence_threshold": "int",
        "stage3_max_live_parameters": "int",
        "stage3_max_reuse_distance": "int",
        "stage3_gather_16bit_weights_on_model_save": "bool",
        "stage3_module_granularity_threshold": "int",
        "stage3_use_all_reduce_for_fetch_params": "bool",
        "stage3_allgather_sequential": "bool",
        "ignore_unused_parameters": "bool",
        "legacy_stage1": "bool",
        "round_robin_gradients": "bool",
        "zero_hpz_partition_size": "int",
        "zero_quantized_weights": "bool",
        "zero_quantized_nontrainable_weights": "bool",
        "zero_quantized_gradients": "bool",
        "zeropp_loco_param": "any",
        "mics_shard_size": "int",
        "mics_hierarchical_params_gather": "bool",
        "memory_efficient_linear": "bool",
        "pipeline_loading_checkpoint": "bool",
        "override_module_apply": "bool",
        "log_trace_cache_warnings": "bool",
    }
)
_DEVICE: Final = ("none", "cpu", "nvme")
SECTIONS: Final[Mapping[str, Mapping[str, Kind]]] = MappingProxyType(
    {
        "": _TOP,
        # What only stage 3 uses may stand there with or without its prefix.
        "zero_optimization": {**_ZERO, **{name.removeprefix("stage3_"): kind for name, kind in _ZERO.items()}},
        "zero_optimization.offload_optimizer": {
            "device": _DEVICE,
            "nvme_path": "text",
            "buffer_count": "int",
            "pin_memory": "bool",
            "pipeline_read": "bool",
            "pipeline_write": "bool",
            "fast_init": "bool",
            "ratio": "number",
            "super_offload": "bool",
            "cpuadam_cores_perc": "number",
        },
        "zero_optimization.offload_param": {
            "device": _DEVICE,
            "nvme_path": "text",
            "buffer_count": "int",
            "buffer_size": "int",
            "max_in_cpu": "int",
            "pin_memory": "bool",
        },
        "fp16": {
            "enabled": "bool",
            "auto_cast": "bool",
            "loss_scale": "number",
            "initial_scale_power": "int",
            "loss_scale_window": "int",
            "hysteresis": "int",
            "consecutive_hysteresis": "bool",
            "min_loss_scale": "number",
            "fp16_master_weights_and_grads": "bool",
        },
        "bf16": {
            "enabled": "bool",
            "immediate_grad_update": "bool",
            "check_grad_overflow": "bool",
            "bf16_master_weights_and_grads": "bool",
            "bf16_optimizer_states": "bool",
        },
    }
)
"""Known keys by the path of the object they stand in."""
REPLACED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cpu_offload": "offload_optimizer",
        "cpu_offload_params": "offload_param",
        "cpu_offload_param": "offload_param",
        "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    }
)
"""Names of old versions → today's."""
AUTOMATIC: Final = frozenset(
    {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "fp16.enabled",
        "bf16.enabled",
    }
)
"""Where XTuner 0.2.0 puts a value in place of `auto` (xtuner/tools/train.py). Inside of an object DeepSpeed takes its own default for
the word; on the outermost level it gets the word itself."""
