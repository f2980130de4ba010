# The first run of the README: Python's standard library by characters, minutes on two CPU cores.
out_dir = 'out-python-char'
eval_interval = 500
eval_iters = 20
log_interval = 50

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
