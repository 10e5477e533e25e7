# Fine-tunes the published Qwen3-0.6B, a Hugging Face folder with safetensors, on any number of GPUs that divides 16.
#   torchrun --standalone --nproc_per_node=2 train_sft.py configs/sft_qwen3_0.6b.py

# the base model, the prepared conversations, and where the run goes
checkpoint_path = "checkpoints/Qwen3-0.6B"
sft_data_dir = "data/sft-qwen3"
out_dir = "out/qwen3-0.6b-sft"

# 64 rows a step, however many GPUs share them
block_size = 2048
batch_size = 4
rows_per_step = 64

# twice over the data
max_epochs = 2
warmup_iters = 50
learning_rate = 2e-5
min_lr = 2e-6

weight_decay = 0.01
grad_clip = 1.0

# evaluation and checkpoints, in steps
eval_interval = 100
save_interval = 100

# the machine
dtype = "bfloat16"
compile = True
