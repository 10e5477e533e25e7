# Laid over another file, it makes a run that shows within minutes whether everything fits together:
#   python train_sft.py configs/sft_qwen3_0.6b.py configs/debug.py

# a few small steps, each of them logged
max_iters = 20
max_epochs = None
batch_size = 1
gradient_accumulation_steps = 2
rows_per_step = None
warmup_iters = 2
log_interval = 1

# every part gets its turn
eval_interval = 10
eval_rows = 8
save_interval = 10

# on whatever machine there is, in a folder that nobody misses
compile = False
dtype = "auto"
out_dir = "out/debug"
