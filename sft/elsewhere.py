"""What to do here instead of the settings that other trainers have."""

PREPARE = {
    "max_length": "the longest sample is block_size",
    "max_seq_length": "the longest sample is block_size",
    "cutoff_len": "the longest sample is block_size",
    "data_format": "the format is recognised record by record",
    "val_size": "the share for validation is val_fraction",
    "test_size": "the share for validation is val_fraction",
    "packing": "samples are packed when training, not here",
    "output_dir": "the folder to write is out_dir",
}

TRAIN = {
    "ignore_index": "masked labels are always -100; leave it out",
    "data_format": "formats are recognised by prepare_sft.py, which writes sft_data_dir",
    "dataset": "prepare it with prepare_sft.py and set sft_data_dir",
    "eval_iters": "evaluation covers the whole validation split; eval_rows limits it",
    "eval_only": "tools read checkpoints; training always trains",
    "use_fsdp": "training is DDP; activation_checkpointing=True saves memory",
    "max_steps": "it is called max_iters here",
    "num_train_epochs": "it is called max_epochs here",
    "epochs": "it is called max_epochs here",
    "lr": "it is called learning_rate here",
    "per_device_train_batch_size": "it is called batch_size here, in rows per GPU",
    "micro_batch_size": "it is called batch_size here, in rows per GPU",
    "global_batch_size": "it is called rows_per_step here, in rows over all GPUs",
    "max_seq_length": "it is called block_size here",
    "max_length": "it is called block_size here",
    "output_dir": "it is called out_dir here",
    "model_name_or_path": "it is called checkpoint_path here: a ckpt_*.pt file or a Hugging Face folder",
    "init_from": "set checkpoint_path (a file or folder) or model (from scratch)",
    "packing": "rows are always packed, each document with attention and positions of its own",
    "bf16": "it is called dtype here: dtype='bfloat16'",
    "fp16": "there is no fp16 training; dtype='bfloat16' needs no loss scaling",
    "gradient_checkpointing": "it is called activation_checkpointing here",
    "warmup_steps": "it is called warmup_iters here",
    "max_grad_norm": "it is called grad_clip here",
}
