# train.py, sample.py and each prepare.py execute this text after they have declared their keys, as nanoGPT's
# scripts do. All of it is one function, so that its own names do not become globals of the script.
def configure(script):
    """
    Sets the keys of a script, whose globals are `script`, as the command line says:

        python train.py config/train_gpt2.py --batch_size=32

    The keys are the globals that hold a bool, int, float, str or None. First each config file runs, then each
    --key=value is set; the last value of a key wins. Returns `config`, a dict of all keys and their values,
    `given_keys`, the set of those that a file or the command line has set, and `check_value`, for the
    values of a checkpoint. Installs the excepthook that ends the script in one line for everything but a bug.
    """
    import builtins
    import errno
    import os
    import re
    import signal
    import sys
    import time
    from contextlib import suppress
    from difflib import get_close_matches
    from pathlib import Path
    from textwrap import fill
    from typing import Literal, get_args, get_origin

    class UserError(ValueError):
        """A mistake of the user; its text is one line that says what to do."""

    # ---------- The keys and what they take ----------
    def fits(value, hint):
        """Whether a value is what an annotation says: int, int | None, Literal['adamw', 'muon'] …"""
        if get_origin(hint) is Literal:
            return value in get_args(hint)
        if get_args(hint):  # the types of a union
            return any(fits(value, part) for part in get_args(hint))
        return type(value) is hint  # isinstance would take True for an int

    def describe(hint):
        """An annotation in words: 'int or None', 'adamw or muon' …"""
        if get_args(hint):  # the types of a union, or the words of a Literal
            return ' or '.join(describe(part) for part in get_args(hint))
        names = {bool: 'bool (True or False)', int: 'int', float: 'float', str: 'str', type(None): 'None'}
        return names.get(hint, hint)  # a word stays as it is

    # A key takes values of the type of its default. If that is None, it takes any.
    config = {}
    hints = {}
    any_value = bool | int | float | str | None
    for name, value in script.items():
        if fits(value, any_value) and not name.startswith('_'):
            config[name] = value
            hints[name] = any_value if value is None else type(value)

    # An annotation, where there is one, says it instead. Python may have left it as text.
    for name, hint in script.get('__annotations__', {}).items():
        hints[name] = eval(hint, script) if isinstance(hint, str) else hint

    def check_value(source, key, value):
        """Returns a value as the key takes it, an int as float where a float is meant. Raises UserError."""
        # Values are cut to some length in all messages, so that these stay one line.
        takes = f"{source}: {key} takes {describe(hints[key])}"
        if type(value) in (int, float):
            if value < 0:  # there is no key for which that has a meaning
                raise UserError(f"{source}: {key} must be at least 0, not {value}")
            if not value < 2**63:  # nan is not below anything
                raise UserError(f"{takes}, finite and within 64 bits")
        if not fits(value, hints[key]):
            if type(value) is int and fits(float(value), hints[key]):
                return float(value)
            raise UserError(f"{takes}, not {value!r:.40}")

        # The keys of all scripts that hold paths: the shell does not expand the ~ of --out_dir=~/runs.
        path_keys = ('out_dir', 'init_from', 'dataset', 'name', 'input', 'files', 'tokenizer', 'val')
        if key in path_keys and type(value) is str:
            return os.path.expanduser(value)
        return value

    # ---------- Config files ----------
    given_keys = set()
    ignored = set()  # names in config files that are no keys

    def find_config(name):
        """The path of a config file, in the working directory or in the project. Raises UserError."""
        project = script.get('ROOT', Path())  # the folder of this file, which each script declares
        for path in (name, os.path.join(project, name)):
            if name.endswith('.py') and os.path.isfile(path):
                return path

        ending = f" here or in {project} (its name ends in .py); a key is written --key=value"
        if 'input' in config:  # a prepare.py that reads texts
            ending = f"; a text is named by --input={name[:160]}"
        for path in project.glob('config/*.py'):
            if path.stem == Path(name).stem:
                ending = f", did you mean config/{path.name}?"
        raise UserError(f"{name[:160]}: no such config file{ending}")

    def run_config(name):
        """Runs a config file, which sees the values so far, and sets the keys that it assigns."""
        # As in nanoGPT, the file sees every name of the script. But it finds them where Python looks last,
        # among the builtins. So its own globals are what it assigns and nothing else, and a key counts as
        # given even where the file assigns it its default.
        scope = {'__builtins__': {**vars(builtins), **script, **config}}
        source = Path(find_config(name)).read_bytes()
        try:
            exec(builtins.compile(source, name, 'exec'), scope)  # train.py has a key named compile
        except Exception as error:  # of any kind
            frame = (
                error.__traceback__.tb_next
            )  # the file's own; None for a syntax error, which names its line
            place = f"{name}, line {frame.tb_lineno}" if frame else name
            raise UserError(f"{place}: {type(error).__name__}: {error!s:.200}") from error

        for key, value in scope.items():
            internal = key.startswith('_') or hasattr(value, '__name__')  # a function, a class, a module
            if key in config:
                config[key] = check_value(name, key, value)
                given_keys.add(key)
            elif not internal:
                # A name like a key's is a typo, unless the file assigns that key too: base_learning_rate may
                # stand beside learning_rate.
                similar = get_close_matches(key.lower(), config, n=1, cutoff=0.8)
                if similar and similar[0] not in scope:
                    raise UserError(f"{name}: unknown key '{key:.40}', did you mean '{similar[0]}'?")
                ignored.add(key)

    # ---------- --key=value ----------
    def read_value(text, hint):
        """What a text stands for: None, a bool, an int or a float where the key takes it, else the text."""
        for constant in (None, True, False):
            if text == str(constant) and fits(constant, hint):
                return constant
        for number in (int, float):  # in this order, so that '3' is an int where a key takes both
            with suppress(ValueError):
                if fits(number(text), hint):
                    return number(text)
        return text

    def advice(name):
        """What to write instead of --name, which is no key or has no value."""
        if name in config:
            value = 'True' if fits(True, hints[name]) else 'value'
            return f"write --{name}={value}, with no space around '='"

        instead = {
            'config': "write the name of a config file alone",
            'lr': "did you mean 'learning_rate'?",
            'no-compile': "write --compile=False",
            'rewind': "go around a bad stretch with another --seed",
        }
        words = "--help lists the keys"
        for similar in get_close_matches(name, config, n=1, cutoff=0.65):
            words = f"did you mean '{similar}'?"
        return f"unknown key '{name:.40}', {instead.get(name, words)}"

    def read_argument(argument):
        """The key and the value of --key=value. Raises UserError."""
        key, equals, text = argument.removeprefix('--').partition('=')
        if key not in config or not equals:
            raise UserError(f"{argument[:160]}: {advice(key)}")
        return key, check_value(argument[:160], key, read_value(text, hints[key]))

    def print_help():
        """Prints the script's docstring, then each key with its default and the comment beside it, in 79
        columns. A comment line above a key is the heading of the group that the key begins."""
        # This is the text above the line that executes this file, with lines like
        # `seed = 1337  # of weights and batches`: heading, key, its annotation, its value, its words.
        declarations = Path(script['__file__']).read_text(encoding='utf-8').partition('\nexec(')[0]
        pattern = r'^(?:# (\w.*)\n)?(\w+)(?:: .*)? ?=.*?(?:  # (.*))?$'

        print(script['__doc__'].strip())
        if config:
            print("\nkeys and their defaults; a config file or --key=value sets them:")
        for heading, key, words in re.findall(pattern, declarations, re.MULTILINE):
            if key not in config:
                continue
            if heading:
                print(f"\n{heading}:")
            if 'Literal' in str(hints[key]):
                words = f"({describe(hints[key])}) {words}"
            text = f"  --{key}={config[key]!r}  ".ljust(28) + words
            print(fill(text, 79, subsequent_indent=28 * ' ', break_on_hyphens=False))

    # ---------- How a script ends before its end ----------
    # The keys tell which script this is, and so what its user can do when memory or a disk is full.
    # `interrupted` is the line after Ctrl-C, `unread` that after a closed pipe (`| head`); None is no line.
    interrupted = None
    unread = None
    make_room = "make room and run it again"
    if 'max_iters' in config:  # train.py
        make_room = "make room and go on with --init_from=auto"
        less_memory = "halve --batch_size, double --gradient_accumulation_steps"
        unread = "nobody reads this run's output any more: go on with --init_from=auto"
    elif 'num_samples' in config:  # sample.py
        less_memory = "fewer --num_samples or --max_new_tokens"
    else:  # a prepare.py
        less_memory = "prepare less text"
        interrupted = "interrupted: the data is not complete"
        unread = interrupted

    # torchrun sets LOCAL_RANK. Some launchers set RANK alone: train.py refuses that, and one rank says so.
    local_rank = os.environ.get('LOCAL_RANK') or os.environ.get('RANK')
    first_rank = local_rank in (None, '', '0')

    def what_failed(stdout):
        """What to name in an error that names no file: stdout, if an empty line cannot be written there."""
        try:
            print(file=stdout, flush=True)
        except OSError:
            return 'stdout'
        return 'cannot write'

    def excepthook(kind, error, trace):
        """Prints one line for everything but a bug, which gets its traceback. It imports nothing, so it knows
        our exceptions and PyTorch's by the names of their classes."""
        # At exit Python would try once more to write what stdout still holds to a full disk or a closed pipe.
        stdout = sys.stdout
        sys.stdout = None
        text = ' '.join(str(error).splitlines())
        user_error = any(base.__name__ == 'UserError' for base in kind.__mro__)
        out_of_memory = kind.__name__.endswith('MemoryError') or "can't allocate memory" in text

        if user_error:
            line = text
        elif isinstance(error, KeyboardInterrupt):
            line = interrupted
        elif isinstance(error, BrokenPipeError):
            line = unread
        elif out_of_memory:
            line = f"out of memory on {script.get('device') or 'this machine'}: {less_memory}"
        elif kind is ModuleNotFoundError:
            line = f"{text}: pip install -r requirements.txt"
        elif isinstance(error, OSError):
            line = text
            if error.strerror:
                line = f"{error.filename or what_failed(stdout)}: {error.strerror}"
            if error.errno == errno.ENOSPC and make_room:
                line += f"; {make_room}"
        else:
            sys.__excepthook__(kind, error, trace)
            return
        if line is None:
            return

        # Under torchrun all ranks may fail alike, and one should speak. So the others wait, and speak if they
        # are still there: when rank 0 has ended, torchrun sends them SIGTERM, which ends them by its default
        # handler. (train.py's own would only note it.)
        if not first_rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        # torch.distributed has replaced sys.stderr by a text that is printed when Python exits. But a rank
        # does not exit that way, because gloo's threads abort one ordinary exit in twelve.
        print(line, file=sys.__stderr__, flush=True)
        if local_rank is not None:
            os._exit(1)

    sys.excepthook = excepthook

    # ---------- The command line ----------
    # What goes to a stream that the shell has closed is dropped. A console gets '?' for a character that it
    # does not have, and a pipe gets each line at once. A notebook's stream stays as it is.
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    with suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors='replace', line_buffering=True)

    arguments = sys.argv[1:]
    if '--help' in arguments or '-h' in arguments:
        unread = make_room = None  # a --help that is cut off has no consequence
        print_help()
        sys.exit()

    # Every --key=value is checked before the config files run, but set after them.
    from_command_line = dict(read_argument(text) for text in arguments if text.startswith('--'))
    for name in arguments:
        if not name.startswith('--'):
            run_config(name)
    config.update(from_command_line)
    given_keys.update(from_command_line)

    if ignored and first_rank:
        print(f"ignored, no keys of {Path(sys.argv[0]).name}: {', '.join(sorted(ignored))}", file=sys.stderr)
    script.update(config)
    return config, given_keys, check_value


config, given_keys, check_value = configure(globals())
del configure
