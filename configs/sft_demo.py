# The demo's fine-tuning: the base model learns to answer. `make demo` prepares the data and runs, on two processes,
#   torchrun --standalone --nproc_per_node=2 train_sft.py configs/sft_demo.py --out_dir=out/demo
# so that its own out_dir is free to be tried by hand: python train_sft.py configs/sft_demo.py --max_iters=20

# the base model, the prepared conversations, and where the run goes
checkpoint_path = "out/demo-base/ckpt.pt"
sft_data_dir = "data/demo-sft"
out_dir = "out/sft-demo"

# rows, whatever the number of processes
block_size = 256
batch_size = 4
rows_per_step = 8

max_iters = 800
warmup_iters = 20
learning_rate = 1e-3
min_lr = 1e-4
weight_decay = 0.01

# evaluation and checkpoints, in steps
eval_interval = 100
save_interval = None
log_interval = 25

compile = False
