"""What becomes of each of transformers.TrainingArguments: honoured, set by this script, refused.

A new release of transformers may bring arguments; the tests ask for a place for each.
"""

FIXED = {
    "output_dir": "set output instead",
    "remove_unused_columns": "batches are packed rows, not columns",
    "disable_tqdm": "the progress line is this script's own",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
}
"""Set by this script, whatever the value."""

MEASURES = "evaluation measures perplexities and KL, and makes no predictions to collect"
HUB = "checkpoints are not uploaded; `hf upload NAME OUTPUT/model` uploads the student"
ORDER = "each step has its place in a fixed order of sequences, which an exact resume needs"
LIGER = "it replaces the forward that holds the loss, which is fused with the head already"
HALF = "its loss gradients underflow; set bf16"

REFUSED = {
    "average_tokens_across_devices": "both losses are always means over the tokens of all ranks",
    "label_smoothing_factor": "the cross-entropy is to the tokens themselves",
    "fp16": HALF,
    "bf16_full_eval": "evaluation runs in the precision of training; set bf16 for both",
    "fp16_full_eval": HALF,
    "use_liger_kernel": LIGER,
    "liger_kernel_config": LIGER,
    "auto_find_batch_size": "the mix counts on the batch size; set row_tokens to limit memory",
    "include_num_input_tokens_seen": "domain_tokens and general_tokens are logged instead",
    "prediction_loss_only": MEASURES,
    "eval_do_concat_batches": MEASURES,
    "eval_use_gather_object": MEASURES,
    "eval_accumulation_steps": MEASURES,
    "include_for_metrics": MEASURES,
    "batch_eval_metrics": MEASURES,
    "label_names": MEASURES,
    "save_only_model": "a run could not resume from a checkpoint without its optimizer",
    "enable_jit_checkpoint": "SIGTERM and SIGINT save a checkpoint in any case",
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "ignore_data_skip": ORDER,
    "restore_callback_states_from_checkpoint": "the state of an interrupted run says to stop",
    "accelerator_config": ORDER,
    "parallelism_config": "packed rows stay whole on one device; set fsdp to share the model out",
    "dataloader_drop_last": "an epoch is filled up to whole steps, so no batch is incomplete",
    "train_sampling_strategy": ORDER,
    "length_column_name": ORDER,
    "deepspeed": "the loss needs the head's whole weight, which FSDP gathers; set fsdp",
    "do_eval": "set eval_strategy",
    "do_predict": "scripts/evaluate.py measures a student",
    "resume_from_checkpoint": "the last whole checkpoint in output is resumed by itself",
    "local_rank": "the launcher sets it",
}
"""Have no effect here, or break what this trainer promises. Their default is accepted."""

HONOURED = frozenset(
    """
    per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm neftune_noise_alpha
    bf16 tf32 use_cpu use_cache full_determinism seed data_seed
    gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    torch_compile torch_compile_backend torch_compile_mode
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    save_strategy save_steps save_total_limit save_on_each_node
    load_best_model_at_end metric_for_best_model greater_is_better
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout fsdp fsdp_config
    debug skip_memory_metrics do_train
    """.split()  # noqa: SIM905
)
