# Trains adapters of Qwen3-8B's base, which takes about a sixth of the memory of training all of it.
#   torchrun --standalone --nproc_per_node=1 train_sft.py configs/lora_qwen3_8b.py

# the base, a folder or a hub name; the prepared conversations; where the run goes
checkpoint_path = "checkpoints/Qwen3-8B-Base"
sft_data_dir = "data/sft-qwen3"
out_dir = "out/qwen3-8b-lora"

# adapters of all linear layers
lora_rank = 16
lora_alpha = 32
lora_dropout = 0.05

# 32 rows a step, however many GPUs share them
block_size = 2048
batch_size = 4
rows_per_step = 32

# twice over the data; adapters take ten times the learning rate of full fine-tuning
max_epochs = 2
warmup_iters = 50
learning_rate = 2e-4
min_lr = 2e-5

weight_decay = 0.0
grad_clip = 1.0

# evaluation and checkpoints, in steps
eval_interval = 100
save_interval = 100

# the machine
dtype = "bfloat16"
compile = True
activation_checkpointing = "auto"
