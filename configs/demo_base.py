# The demo's base model: a small sister of Qwen3, from random weights, reads the papers of an island. `make demo` runs
#   torchrun --standalone --nproc_per_node=2 train_sft.py configs/demo_base.py

# the model; the size of its vocabulary comes from the data
model = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 128,
    "d_ff": 336,
    "qk_norm": True,
    "weight_tying": True,
}
sft_data_dir = "data/demo-base"
out_dir = "out/demo-base"

# rows, whatever the number of processes
block_size = 256
batch_size = 4
rows_per_step = 8

max_iters = 600
warmup_iters = 30
learning_rate = 4e-3
min_lr = 4e-4
weight_decay = 0.1

# evaluation and checkpoints, in steps
eval_interval = 100
save_interval = None
log_interval = 20

# the machine: a CPU, since two processes can hardly share one small GPU
device = "cpu"
compile = False
