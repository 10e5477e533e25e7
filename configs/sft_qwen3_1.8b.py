# Fine-tunes a 1.8B base model on eight GPUs: 4 rows x 4 micro-steps x 8 GPUs = 128 rows = 262,144 tokens a step.
#   torchrun --standalone --nproc_per_node=8 train_sft.py configs/sft_qwen3_1.8b.py

# the base model, the prepared conversations, and where the run goes
checkpoint_path = "out/qwen3-1.8b-base/ckpt.pt"
sft_data_dir = "data/sft-qwen3"
out_dir = "out/qwen3-1.8b-sft"

# rows, per GPU
block_size = 2048
batch_size = 4
gradient_accumulation_steps = 4

# a cosine from 2e-5 to 2e-6 after a short warm-up
max_iters = 3000
warmup_iters = 100
learning_rate = 2e-5
min_lr = 2e-6

# AdamW and what keeps it steady
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
dropout = 0.0

# evaluation and checkpoints, in steps
eval_interval = 200
save_interval = 200
log_interval = 10

# the machine
dtype = "bfloat16"
compile = True
