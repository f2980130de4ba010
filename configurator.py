def _configure(script):
    """
    Config files and --key=value become the globals of the script that executes this file:

        python train.py config/train_shakespeare_char.py --batch_size=32 --out_dir=out-try

    A script assigns its defaults and then says exec((folder / 'configurator.py').read_text()).
    Every global that holds a bool, int, float, str or None and does not begin with '_' is a key;
    one annotated `int | None` takes None as well. Later arguments win. A config file is Python, sees
    the keys above it and may compute with them. Afterwards the global `config` is a dict of all keys.
    Mistakes end in one line and exit status 1.
    """
    import ast, builtins, difflib, math, os, re, sys, time  # here, so that the script's globals stay its own
    from pathlib import Path

    defaults = {key: value for key, value in script.items()
                if key[0] != '_' and isinstance(value, (bool, int, float, str, type(None)))}
    config = dict(defaults)

    def fail(message):
        if os.environ.get('LOCAL_RANK', '0') != '0':  # under torchrun one a machine speaks, and ends first
            time.sleep(10)
            sys.exit(1)
        sys.exit(message)

    def kinds(key):  # the types that a key takes, by name: ['int'], or ['int', 'None']
        guess = 'Any | None' if defaults[key] is None else type(defaults[key]).__name__
        hint = script.get('__annotations__', {}).get(key, guess)
        return (hint.__name__ if isinstance(hint, type) else str(hint)).split(' | ')

    def parse(key, text):  # what stands behind '=' on the command line
        takes = kinds(key) if key in defaults else ['str']
        if 'str' not in takes or (text == 'None' and 'None' in takes):
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pass  # no Python literal: stays text, and put() says what the key takes
        return text

    def put(key, value, source):
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            fail(f"{source}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else ", --help lists the keys"))
        takes = kinds(key)
        if type(value) is int and 'float' in takes:
            value = float(value)
        name = 'None' if value is None else type(value).__name__
        if name not in takes and ('Any' not in takes or name not in ('bool', 'int', 'float', 'str')):
            fail(f"{source}: {key} takes {' or '.join(takes)}, not {value!r}" + (" (True or False, capitalised)" if 'bool' in takes else ""))
        if name == 'float' and not math.isfinite(value):
            fail(f"{source}: {key} must be a finite number, not {value!r}")
        config[key] = value

    def run(name):  # config/x.py of the working directory, else of the project
        project = [folder for folder in Path(script.get('__file__', name)).resolve().parents if (folder / 'configurator.py').is_file()]
        path = next((p for p in (Path(name), *(folder / name for folder in project)) if p.is_file()), None)
        if path is None:
            fail(f"{name}: no such config file (a key is written --key=value)")
        seen = dict(config)
        try:
            exec(builtins.compile(path.read_bytes(), str(path), 'exec'), seen)
        except Exception as error:  # whatever the user's file raises is said, with its line
            at = error.__traceback__.tb_next
            line = error.lineno if isinstance(error, SyntaxError) else at.tb_lineno if at else 0
            fail(f"{name}, line {line}: {type(error).__name__}: {error}")
        for key, value in seen.items():
            if key[0] != '_' and not callable(value) and type(value).__name__ not in ('module', '_Feature'):
                put(key, value, name)

    if {'-h', '--help'} & set(sys.argv):
        source = Path(script['__file__']).read_text(encoding='utf-8')
        print((script.get('__doc__') or '').strip(), '\n\nkeys and their defaults:', sep='')
        for key, value in defaults.items():  # with the comment that stands beside each
            comment = re.search(rf'^{key}\b.*?  # (.*)$', source, re.MULTILINE)
            print(f"  --{key}={value!r}".ljust(40), comment[1] if comment else '')
        sys.exit()
    for argument in sys.argv[1:]:
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('--'):
            run(argument)
        elif not equals:
            fail(f"{argument}: write --{key}=value, with no space around '='")
        else:
            put(key, parse(key, text), argument)
    script.update(config, config=config)

_configure(globals())
del _configure
