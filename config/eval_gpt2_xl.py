# Evaluates OpenAI's gpt2-xl (1558M parameters) on data/openwebtext.
# --dataset=NAME selects other data in GPT-2's encoding.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2-xl'
