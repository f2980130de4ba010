# Fine-tunes GPT-2 XL on tiny Shakespeare.
# If memory is short, use --init_from=gpt2 or a smaller --block_size.
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'

always_save_checkpoint = False  # the model overfits: keep the best one

# 32 sequences x 1024 tokens: 32,768 tokens per iteration.
# train.bin has 301,966 tokens, so an epoch takes about 9 iterations.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
