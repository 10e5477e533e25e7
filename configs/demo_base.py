# The demo's base model: a small sister of Qwen3, from random weights, reads the papers of an island. `make demo` runs
#   torchrun --standalone --nproc_per_node=2 train_sft.py configs/demo_base.py

# the model; the size of its vocabulary comes from the data
model = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 128,
    "d_ff": 336,
    "rope_theta": 100.0,  # short texts: more of the rotary pairs tell neighbours apart
    "weight_tying": True,
}
sft_data_dir = "data/demo-base"
out_dir = "out/demo-base"

# rows, whatever the number of processes
block_size = 256
batch_size = 2
rows_per_step = 4

max_iters = 2200
warmup_iters = 60
learning_rate = 4e-3
min_lr = 4e-4
weight_decay = 0.1

# evaluation and checkpoints, in steps
eval_interval = 250
save_interval = None
log_interval = 25

compile = False
