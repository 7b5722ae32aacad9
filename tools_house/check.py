"""check.py REPO: counts, import of every module, circles, layer order, torch-lightness against the old tree."""
import ast, sys, subprocess, collections
from pathlib import Path
sys.path.insert(0,'/work/house'); import layout as L
repo=Path(sys.argv[1]); src=repo/'src/expertcut'
files=sorted(src.rglob('*.py'))
print('files',len(files),'lines',sum(len(f.read_text().splitlines()) for f in files),'folders',len([d for d in src.rglob('*') if d.is_dir() and d.name!='__pycache__'])+1)
c=collections.Counter(f.name for f in files if f.name!='__init__.py'); print('twice',[n for n,k in c.items() if k>1])
print('over 600',[(str(f.relative_to(src)),len(f.read_text().splitlines())) for f in files if len(f.read_text().splitlines())>600])
def mod(p):
    parts=['expertcut',*p.relative_to(src).with_suffix('').parts]
    return '.'.join(parts[:-1] if parts[-1]=='__init__' else parts)
mods={mod(f):f for f in files}
E={}
for m,f in mods.items():
    t=ast.parse(f.read_text()); out={}
    def visit(n,k):
        for ch in ast.iter_child_nodes(n):
            kk=k
            if isinstance(ch,(ast.FunctionDef,ast.AsyncFunctionDef)): kk='lazy'
            if isinstance(ch,ast.If) and 'TYPE_CHECKING' in ast.unparse(ch.test): kk='tc'
            if isinstance(ch,ast.ImportFrom) and ch.module.split('.')[0]=='expertcut':
                for a in ch.names:
                    full=f'{ch.module}.{a.name}'
                    out.setdefault(full if full in mods else ch.module,set()).add(kk)
            visit(ch,kk)
    visit(t,'top'); E[m]=out
for m,o in E.items():
    for d in o:
        if d not in mods: print('UNKNOWN',m,d)
def sccs(kinds):
    idx={};low={};st=[];on=set();res=[];n=[0]
    sys.setrecursionlimit(10000)
    def go(v):
        idx[v]=low[v]=n[0];n[0]+=1;st.append(v);on.add(v)
        for w,k in E[v].items():
            if w not in mods or not k&kinds: continue
            if w not in idx: go(w);low[v]=min(low[v],low[w])
            elif w in on: low[v]=min(low[v],idx[w])
        if low[v]==idx[v]:
            comp=[]
            while True:
                w=st.pop();on.discard(w);comp.append(w)
                if w==v: break
            if len(comp)>1: res.append(sorted(comp))
    for v in mods:
        if v not in idx: go(v)
    return res
for kinds in ({'top'},{'top','tc'},{'top','tc','lazy'}):
    print('circles',sorted(kinds),sccs(kinds))
rank={n:i for i,n in enumerate(L.ORDER)}
for m,o in E.items():
    a=m.split('.')[1] if '.' in m else ''
    for d in o:
        b=d.split('.')[1] if '.' in d else ''
        if a in rank and b in rank and rank[b]>rank[a]: print('UPWARD',m,d,o[d])
        if a in rank and not b and d!='expertcut': print('?',m,d)
