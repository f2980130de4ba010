def _configure(script):
    """Config files and --key=value become globals of the script that executes this file; later ones win. Its
    keys are the globals that hold a bool, int, float, str or None; annotations such as `int | None` say more.
    A config file is Python and sees the keys above it. Leaves `config`, `given_keys` and `key_types`."""
    import builtins  # imported in here, so that the script's globals stay its own
    import difflib
    import os
    import re
    import sys
    import time
    from contextlib import suppress
    from pathlib import Path
    from typing import Union, get_args

    def excepthook(kind, error, trace):  # for what follows in the script
        sys.stdout = None  # else Python would try once more to write what `| head` no longer reads
        if kind is ModuleNotFoundError and error.name not in ('data', 'model'):
            print(f"{error}: pip install -r requirements.txt", file=sys.stderr)
        elif kind not in (KeyboardInterrupt, BrokenPipeError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = excepthook
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open('w') for stream in (sys.stdout, sys.stderr))
    with suppress(AttributeError, OSError):  # if it is a notebook's; a console may lack characters
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    scalars = {bool: 'bool (True or False)', int: 'int', float: 'float', str: 'str', type(None): 'None'}
    defaults = {key: value for key, value in script.items() if key[0] != '_' and type(value) in scalars}
    first_process, hints = os.environ.get('LOCAL_RANK', '0') == '0', script.get('__annotations__', {})
    given, ignored, takes, described = {}, {}, {}, {}  # takes[key]: [int, NoneType], described: 'int or None'
    for key, value in defaults.items():
        hint = hints.get(key, Union[tuple(scalars)] if value is None else type(value))
        hint = eval(hint, script) if isinstance(hint, str) else hint
        takes[key] = [item for part in get_args(hint) or [hint] for item in get_args(part) or [part]]
        described[key] = ' or '.join(scalars.get(item, str(item)) for item in takes[key])

    def fail(source, message):
        time.sleep(0 if first_process else 10)  # torchrun ends all when one ends: the first prints
        sys.exit(' '.join(f"{source}: {message}".split()) if first_process else 1)

    def assign(source, key, value):
        if type(value) in (int, float) and not abs(value) < (2**63 if type(value) is int else float('inf')):
            fail(source, f"{key} takes {described[key]}, finite and within 64 bits")
        fits = type(value) in takes[key] or isinstance(value, str) and value in takes[key]
        if not fits and not (type(value) is int and float in takes[key]):
            fail(source, f"{key} takes {described[key]}, not {value!r:.40}")
        given[key] = value if fits else float(value)

    def run(name):
        folders = Path(script.get('__file__', name)).resolve().parents
        project = [folder / name for folder in folders if os.path.isfile(folder / 'configurator.py')]
        if not (path := next(filter(os.path.isfile, [name, *project]), None)):
            fail(name[:160], "no such config file (a key is written --key=value)")
        scope = {'__builtins__': {**vars(builtins), **defaults, **given}}
        try:
            exec(builtins.compile(Path(path).read_bytes(), path, 'exec'), scope)
        except Exception as error:  # whatever the file raises
            line = getattr(error.__traceback__.tb_next, 'tb_lineno', getattr(error, 'lineno', 0))
            fail(f"{name}, line {line}", f"{type(error).__name__}: {str(error):.200}")
        for key, value in scope.items():  # what the file assigned: the keys that it read are in __builtins__
            if key in defaults:
                assign(name, key, value)
            elif key[0] != '_' and not callable(value) and type(value).__name__ not in ('module', '_Feature'):
                if similar := difflib.get_close_matches(key.lower(), defaults, n=1, cutoff=0.8):
                    fail(name, f"unknown key '{key:.40}', did you mean '{similar[0]}'?")
                ignored[key] = name

    if {'-h', '--help'} & set(sys.argv):
        source = re.sub(r'\n +#', '', Path(script['__file__']).read_text(encoding='utf-8'))
        comments = dict(re.findall(r'^(\w+)\b.*?  # (.*)', source, re.MULTILINE)[::-1])  # the first of a key
        print((script.get('__doc__') or '').strip(), '\n\nkeys and their defaults:', sep='')
        for key, value in defaults.items():
            choices = f"({described[key]}) " if any(isinstance(item, str) for item in takes[key]) else ''
            print(f"  --{key}={value!r}".ljust(40), choices + comments.get(key, ''))
        sys.exit()
    for argument in sys.argv[1:]:
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('--'):
            run(argument)
        elif not (key and equals):
            fail(argument[:160], f"write --{key or 'key':.40}=value, with no space around '='")
        elif key not in defaults:
            close = [n for n in defaults if n.startswith(key) or ''.join(w[:1] for w in n.split('_')) == key]
            close += difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else "--help lists the keys"
            fail(argument[:160], f"unknown key '{key:.40}', {hint}")
        else:
            value = {'None': None, 'True': True, 'False': False}.get(text, text)
            for number in (float, lambda digits: int(digits, base=0)):  # an int where both succeed
                with suppress(ValueError):
                    value = number(text)
            usable = type(value) in takes[key] or type(value) is int and float in takes[key]
            assign(argument[:160], key, value if usable else text)
    if ignored and first_process:
        print(f"ignored, no keys of {Path(sys.argv[0]).name}: {', '.join(ignored)}", file=sys.stderr)
    script.update(given, config={**defaults, **given}, given_keys=set(given), key_types=takes)


_configure(globals())
del _configure
