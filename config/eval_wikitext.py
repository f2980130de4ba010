# GPT-2's perplexity on WikiText-2 without training on it, per token and per word: every token of data/wikitext's val.bin once.
# Other models: --init_from=gpt2-xl, a folder, or resume and --out_dir
dataset = 'wikitext'
batch_size = 8
eval_iters = None
eval_only = True
wandb_log = False
init_from = 'gpt2'
