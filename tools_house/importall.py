import sys, importlib, pathlib
src=pathlib.Path(sys.argv[1])/'src'
for f in sorted((src/'expertcut').rglob('*.py')):
    n='.'.join(f.relative_to(src).with_suffix('').parts)
    n=n.removesuffix('.__init__')
    if n.endswith(('__main__','modeling_exact')): continue
    importlib.import_module(n)
import expertcut; print(expertcut.__file__, 'all imported')
