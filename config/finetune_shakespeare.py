# GPT-2 XL, fine-tuned on tiny Shakespeare. Short of memory: init_from = 'gpt2', or a smaller block_size.
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'

always_save_checkpoint = False  # it overfits: keep the best

# 32 sequences x 1024 tokens: 32,768 tokens an iteration, so the 301,966 of train.bin are an epoch in about 9
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
