"""verify.py OLD_REPO NEW_REPO: every definition of the old tree stands in the new one, and what differs."""
import ast, re, sys, difflib
from pathlib import Path
sys.path.insert(0,'/work/house'); import layout as L
old=Path(sys.argv[1])/'src/expertcut'; new=Path(sys.argv[2])/'src/expertcut'
class Strip(ast.NodeTransformer):
    def visit_ImportFrom(self,n): return None if n.module and n.module.split('.')[0]=='expertcut' else n
    def visit_If(self,n):
        self.generic_visit(n)
        return n if n.body else None
def defs(tree):
    out={}
    for s in tree.body:
        if isinstance(s,(ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef)): out.setdefault(s.name,[]).append(s)
        elif isinstance(s,ast.Assign):
            out.setdefault(ast.unparse(s.targets[0]),[]).append(s)
        elif isinstance(s,ast.AnnAssign): out.setdefault(ast.unparse(s.target),[]).append(s)
        elif not isinstance(s,(ast.Import,ast.ImportFrom)) and not (isinstance(s,ast.Expr) and isinstance(s.value,ast.Constant)) and not (isinstance(s,ast.If) and 'TYPE_CHECKING' in ast.unparse(s.test)):
            out.setdefault('stmt:'+ast.unparse(s)[:60],[]).append(s)
    return out
def text(s): return ast.unparse(Strip().visit(ast.parse(ast.unparse(s))))
news={t:defs(ast.parse((new/t).read_text())) for t in L.TARGETS}
renamed=0; ALLOWED={kv for d in L.RENAMES.values() for kv in d.items()}; missing=0; differ=0; n=0; used={t:set() for t in L.TARGETS}
for t,(doc,parts) in L.TARGETS.items():
    for p in parts:
        for name,nodes in defs(ast.parse((old/p).read_text())).items():
            if name=='__all__' : continue
            n+=1
            target=L.SYMBOLS.get((p,name),t)
            nn=L.RENAMES.get(p,{}).get(name,name)
            got=news[target].get(nn)
            if not got:
                missing+=1; print('MISSING',p,name,'in',target); continue
            used[target].add(nn)
            assert len(got)==len(nodes),(p,name,len(got),len(nodes))
            for a,b in zip(nodes,got):
                x,y=text(a),text(b)
                if x!=y:
                    wx,wy=re.findall(r'\w+|\W',x),re.findall(r'\w+|\W',y)
                    if len(wx)==len(wy) and all(p==q or (p,q) in ALLOWED for p,q in zip(wx,wy)): renamed+=1; continue
                    differ+=1
                    print(f'--- {p}:{name} -> {target}:{nn}')
                    for l in difflib.unified_diff(x.splitlines(),y.splitlines(),lineterm='',n=0):
                        if not l.startswith(('---','+++','@@')): print('   ',l[:200])
for t in L.TARGETS:
    extra=set(news[t])-used[t]-{'__all__'}
    if extra: print('EXTRA',t,extra)
print(n,'definitions,',missing,'missing,',differ,'differ otherwise,',renamed,'only by renames')
