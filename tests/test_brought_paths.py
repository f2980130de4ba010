"""Data that do not stand in the project, and printed commands that a shell takes as they are."""

import os
import re
import shlex

from conftest import SMALL

TEXT = 'Fische schwimmen. ' * 60


def printed_command(out, beginning):
    """The words of the command that a line with this beginning prints."""
    line = re.search(rf'^{beginning} *(.*)', out, re.M)[1]
    return shlex.split(line)


def test_a_folder_elsewhere_leaves_the_project_alone(run, house, tmp_path):
    """prepare.py and train.py take the whole path of a folder, and write nothing into the project."""
    (tmp_path / 'book.txt').write_text(TEXT)
    folder = tmp_path / 'mein Text ü'
    before = {path for path in house.rglob('*') if '__pycache__' not in path.parts}
    out = run('data/custom/prepare.py', '--input=book.txt', f'--name={folder}').stdout
    assert sorted(path.name for path in folder.iterdir()) == ['meta.pkl', 'train.bin', 'val.bin']

    # What it prints can be pasted, from this working directory too.
    python, script, *arguments = printed_command(out, 'train on it:')
    assert os.path.samefile(script, house / 'train.py') and f'--dataset={folder}' in arguments
    python, script, *sampling = printed_command(out, 'then:')
    assert os.path.samefile(script, house / 'sample.py') and sampling == ['--out_dir=out-mein Text ü']

    small = [key for key in SMALL if not key.startswith('--dataset')]
    out = run('train.py', f'--dataset={folder}', '--out_dir=out-mein Text ü', *small).stdout
    assert f'\n{folder}: 972 tokens to train on' in out
    text = run('sample.py', *sampling, '--num_samples=1', '--max_new_tokens=20').stdout
    assert set(text.partition('\n---')[0]) <= {*TEXT, '\n'}  # which sample.py prints behind a text
    assert before == {path for path in house.rglob('*') if '__pycache__' not in path.parts}


def test_a_path_that_is_not_whole_is_told_as_a_whole(run, house, tmp_path):
    (tmp_path / 'book.txt').write_text(TEXT)
    error = run('data/custom/prepare.py', '--input=book.txt', '--name=my data/x', status=1)
    whole = f"--name={tmp_path / 'my data' / 'x'}"
    assert f"name 'my data/x' is a path: give it as a whole, {shlex.quote(whole)}, or" in error
    assert not (tmp_path / 'my data').exists()

    run('data/custom/prepare.py', '--input=book.txt', whole)
    error = run('train.py', '--dataset=my data/x', status=1)
    assert f"{shlex.quote(f'--dataset={tmp_path}/my data/x')} is the whole path of that folder" in error


def test_home_is_where_a_tilde_points(run, tmp_path):
    (tmp_path / 'book.txt').write_text(TEXT)
    run('data/custom/prepare.py', '--input=book.txt', '--name=~/x', env={'HOME': str(tmp_path)})
    assert (tmp_path / 'x' / 'train.bin').exists()
    error = run('train.py', '--dataset=~/y', env={'HOME': str(tmp_path)}, status=1)
    assert error.startswith(f"there is no {tmp_path / 'y' / 'train.bin'}: run `python ")
    assert error.endswith(f"prepare.py --input=TEXT --name={tmp_path / 'y'}`\n")


def test_printed_commands_are_quoted_for_the_shell(run, house, tmp_path):
    """Names with spaces, quotes and umlauts come back from a shell as they were typed."""
    name = "mein Text ü 'x'"
    (tmp_path / 'book.txt').write_text(TEXT)
    out = run('data/custom/prepare.py', '--input=book.txt', f'--name={name}').stdout
    assert f'--dataset={name}' in printed_command(out, 'train on it:')
    assert printed_command(out, 'then:')[-1] == f'--out_dir=out-{name}'

    (house / 'data' / name / 'val.bin').unlink()
    error = run('train.py', f'--dataset={name}', status=1)
    command = shlex.split(re.search(r'run `(.*)`', error)[1])
    assert command[2:] == ['--input=TEXT', f'--name={name}']

    # Another tokenizer than that of the weights, which stand in a folder with a space.
    (tmp_path / 'other.txt').write_text(TEXT + 'xyz')
    run('train.py', *SMALL, '--out_dir=my out', '--max_iters=1')
    run('data/custom/prepare.py', '--input=other.txt', '--name=other')
    error = run('train.py', *SMALL, '--dataset=other', '--init_from=my out', '--out_dir=new', status=1)
    command = shlex.split(re.search(r'`(.*)`', error)[1])
    assert command[2:] == ['--input=TEXT', '--name=NAME', '--tokenizer=my out']

    # The folders beside one that has no checkpoint.
    error = run('sample.py', '--out_dir=none', status=1)
    assert error.endswith("add --out_dir='my out'\n")
