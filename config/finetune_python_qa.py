# Teaches a model of the text of Python's library to answer questions about it, in a minute or two on two CPU
# cores. data/python_qa/readme.md has the run that comes before it.
out_dir = 'out-python-qa'
init_from = 'out-python-source'
eval_interval = 100
eval_iters = None  # all of val.bin
log_interval = 50
always_save_checkpoint = False  # the model overfits: keep the best one

dataset = 'python_qa'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128

# These are the sizes of config/train_python_char.py, which the weights have.
n_layer = 3
n_head = 4
n_embd = 160

# It uses a quarter of the learning rate of that run, for five passes over 2,900 questions.
optimizer = 'muon'
learning_rate = 2e-3
lr_schedule = 'linear'
min_lr = 0.0
beta2 = 0.98
max_iters = 400
lr_decay_iters = 400
warmup_iters = 20
