# Measures GPT-2's zero-shot perplexity on WikiText-2, per token and per word.
# It reads every token of data/wikitext/val.bin once.
# Other models: --init_from=gpt2-xl, --init_from=FOLDER, or --init_from=resume --out_dir=FOLDER
dataset = 'wikitext'
batch_size = 8
eval_iters = None  # all of val.bin
eval_only = True
wandb_log = False
init_from = 'gpt2'
