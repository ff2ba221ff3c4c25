// PTX text -> modules, variables, and kernels decoded on first use.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <unordered_set>

#include "ptx.h"

namespace gs {

int ty_size(Ty t) {
  switch (t) {
    case B8:
    case U8:
    case S8:
    case PRED:
      return 1;
    case B16:
    case U16:
    case S16:
    case F16:
    case BF16:
    case E4M3X2:
    case E5M2X2:
      return 2;
    case B32:
    case U32:
    case S32:
    case F32:
    case F16X2:
    case BF16X2:
    case U16X2:
    case S16X2:
    case TF32:
      return 4;
    case B64:
    case U64:
    case S64:
    case F64:
    case F32X2:
      return 8;
    case B128:
      return 16;
    default:
      return 0;
  }
}
Ty ty_parse(std::string_view s) {
  static const std::unordered_map<std::string_view, Ty> m = {
      {"b8", B8},        {"b16", B16},       {"b32", B32},   {"b64", B64},   {"b128", B128},
      {"u8", U8},        {"u16", U16},       {"u32", U32},   {"u64", U64},   {"s8", S8},
      {"s16", S16},      {"s32", S32},       {"s64", S64},   {"f16", F16},   {"f16x2", F16X2},
      {"bf16", BF16},    {"bf16x2", BF16X2}, {"f32", F32},   {"f64", F64},   {"f32x2", F32X2},
      {"u16x2", U16X2},  {"s16x2", S16X2},   {"pred", PRED}, {"tf32", TF32}, {"e4m3x2", E4M3X2},
      {"e5m2x2", E5M2X2}};
  auto i = m.find(s);
  return i == m.end() ? T_NONE : i->second;
}

struct Var {
  std::string name;
  char space = 0; /* g c s l p */
  uint32_t align = 1;
  uint64_t size = 0;
  bool ext = false;
  uint64_t addr = 0;
};
struct FuncSrc {
  std::string name;
  bool entry = false;
  size_t body_lo = 0, body_hi = 0;
  uint32_t line = 0;
  std::vector<Var> rets, params;
  uint32_t max_threads = 1024;
  bool defined = false;
};

struct Module {
  std::string text, origin;
  std::vector<size_t> line_start;
  std::map<std::string, Var> vars;
  std::map<std::string, FuncSrc> funcs;
  std::map<std::string, Kernel*> kernels;
  uint8_t* data = nullptr;
};
std::string module_line(Module* m, uint32_t line) {
  if (line == 0 || line > m->line_start.size()) return "?";
  size_t a = m->line_start[line - 1],
         b = line < m->line_start.size() ? m->line_start[line] - 1 : m->text.size();
  std::string s = m->text.substr(a, b - a);
  size_t i = s.find_first_not_of(" \t");
  return i == std::string::npos ? "" : s.substr(i);
}

// ---------------------------------------------------------------- lexing
struct Lex {
  const Module& m;
  const std::string& t;
  size_t p, end;
  uint32_t line;
  Lex(const Module& mm, size_t lo, size_t hi, uint32_t ln)
      : m(mm), t(mm.text), p(lo), end(hi), line(ln) {}
  [[noreturn]] void fail(const std::string& why) {
    die("PTX parse error in " + m.origin + " line " + std::to_string(line) + ": " + why + "\n    " +
        module_line(const_cast<Module*>(&m), line));
  }
  void ws() {
    while (p < end) {
      char c = t[p];
      if (c == '\n') {
        ++line;
        ++p;
      } else if (c == ' ' || c == '\t' || c == '\r')
        ++p;
      else if (c == '/' && p + 1 < end && t[p + 1] == '/') {
        while (p < end && t[p] != '\n') ++p;
      } else if (c == '/' && p + 1 < end && t[p + 1] == '*') {
        p += 2;
        while (p + 1 < end && !(t[p] == '*' && t[p + 1] == '/')) {
          if (t[p] == '\n') ++line;
          ++p;
        }
        p += 2;
      } else
        break;
    }
  }
  bool done() {
    ws();
    return p >= end;
  }
  char peek() {
    ws();
    return p < end ? t[p] : 0;
  }
  bool eat(char c) {
    if (peek() == c) {
      ++p;
      return true;
    }
    return false;
  }
  void need(char c) {
    if (!eat(c)) fail(std::string("expected '") + c + "'");
  }
  static bool idc(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }
  std::string_view word() {  // identifier, possibly starting with '.', '%', '$'
    ws();
    size_t a = p;
    if (p < end && t[p] == '.') ++p;
    while (p < end && idc(t[p])) ++p;
    return std::string_view(t).substr(a, p - a);
  }
  std::string_view opword() {  // opcode with dots and '::'
    ws();
    size_t a = p;
    while (p < end && (idc(t[p]) || t[p] == '.' ||
                       (t[p] == ':' && p + 1 < end && (t[p + 1] == ':' || t[p - 1] == ':'))))
      ++p;
    return std::string_view(t).substr(a, p - a);
  }
  void skip_line() {
    while (p < end && t[p] != '\n') ++p;
  }
  void skip_to(char c) {
    while (p < end && t[p] != c) {
      if (t[p] == '\n') ++line;
      ++p;
    }
    ++p;
  }
  void skip_braces() {  // at '{'
    int d = 0;
    for (; p < end; ++p) {
      char c = t[p];
      if (c == '\n')
        ++line;
      else if (c == '"') {
        ++p;
        while (p < end && t[p] != '"') {
          if (t[p] == '\\') ++p;
          ++p;
        }
      } else if (c == '/' && t[p + 1] == '/') {
        while (p < end && t[p] != '\n') ++p;
        --p;
      } else if (c == '{')
        ++d;
      else if (c == '}' && --d == 0) {
        ++p;
        return;
      }
    }
  }
  bool number(Operand& o) {  // optional sign handled by caller
    ws();
    if (!isdigit((unsigned char)t[p])) return false;
    o.k = Operand::IMM;
    if (t[p] == '0' && (t[p + 1] == 'f' || t[p + 1] == 'F') && p + 10 <= t.size() &&
        isxdigit((unsigned char)t[p + 2])) {
      o.fk = 1;
      o.bits = strtoul(t.substr(p + 2, 8).c_str(), nullptr, 16);
      p += 10;
      return true;
    }
    if (t[p] == '0' && (t[p + 1] == 'd' || t[p + 1] == 'D') && p + 18 <= t.size()) {
      o.fk = 2;
      o.bits = strtoull(t.substr(p + 2, 16).c_str(), nullptr, 16);
      p += 18;
      return true;
    }
    size_t a = p;
    bool hex = t[p] == '0' && (t[p + 1] == 'x' || t[p + 1] == 'X'), fl = false;
    if (hex) p += 2;
    while (p < end &&
           (isalnum((unsigned char)t[p]) || (!hex && t[p] == '.') ||
            (!hex && (t[p] == '-' || t[p] == '+') && (t[p - 1] == 'e' || t[p - 1] == 'E')))) {
      if (!hex && (t[p] == '.' || t[p] == 'e' || t[p] == 'E')) fl = true;
      ++p;
    }
    std::string s = t.substr(a, p - a);
    if (fl) {
      o.fk = 3;
      o.dec = strtod(s.c_str(), nullptr);
    } else if (s.size() > 2 && (s[1] == 'b' || s[1] == 'B'))
      o.bits = strtoull(s.c_str() + 2, nullptr, 2);
    else
      o.bits = strtoull(s.c_str(), nullptr, 0);
    return true;
  }
  Operand operand() {
    Operand o;
    char c = peek();
    if (c == '{' || c == '(') {
      ++p;
      o.k = c == '{' ? Operand::VEC : Operand::LIST;
      char e = c == '{' ? '}' : ')';
      if (eat(e)) return o;
      do o.v.push_back(operand());
      while (eat(','));
      need(e);
      return o;
    }
    if (c == '[') {
      ++p;
      o.k = Operand::MEM;
      Operand b = operand();
      if (b.k == Operand::REG || b.k == Operand::SYM) {
        o.s = b.s;
        o.off = b.off;
      } else if (b.k == Operand::IMM)
        o.off = (int64_t)b.bits;
      else
        fail("bad address");
      if (eat('+')) {
        Operand n = operand();
        o.off += (int64_t)n.bits;
      } else if (peek() == '-') {
        Operand n = operand();
        o.off += (int64_t)n.bits;
      }
      while (eat(',')) o.v.push_back(operand());
      need(']');
      return o;
    }
    if (c == '!') {
      ++p;
      o = operand();
      o.neg = !o.neg;
      return o;
    }
    if (c == '-') {
      ++p;
      o = operand();
      if (o.k != Operand::IMM) fail("'-' before a non-number");
      if (o.fk == 0)
        o.bits = (uint64_t)-(int64_t)o.bits;
      else if (o.fk == 1)
        o.bits ^= 0x80000000u;
      else if (o.fk == 2)
        o.bits ^= 1ull << 63;
      else
        o.dec = -o.dec;
      return o;
    }
    if (number(o)) return o;
    std::string w(word());
    if (w.empty()) fail(std::string("unexpected '") + c + "'");
    if (w == "_") {
      o.k = Operand::SINK;
      if (eat('|')) o.v.push_back(operand());
      return o;
    }
    while (p < end && t[p] == '.' && w[0] == '%') {
      w += ".";
      ++p;
      while (p < end && idc(t[p])) w += t[p++];
    }  // %tid.x
    o.k = w[0] == '%' ? Operand::REG : Operand::SYM;
    o.s = w;
    size_t save = p;
    uint32_t sl = line;
    if (eat('|')) {
      o.v.push_back(operand());
      return o;
    }
    p = save;
    line = sl;
    if (o.k == Operand::SYM && peek() == '+') {
      ++p;
      Operand n = operand();
      o.off = (int64_t)n.bits;
    }
    return o;
  }
};

// ---------------------------------------------------------------- module level
static Var parse_var(Lex& L, char space) {  // after the space keyword: attributes type name[dims]
  Var v;
  v.space = space;
  Ty t = T_NONE;
  int vec = 1;
  bool align_given = false;
  while (true) {
    char c = L.peek();
    if (c == '.') {
      std::string_view w = L.word();
      if (w == ".align") {
        Operand n;
        L.number(n);
        v.align = (uint32_t)n.bits;
        align_given = true;
      } else if (w == ".v2")
        vec = 2;
      else if (w == ".v4")
        vec = 4;
      else if (w == ".ptr" || w == ".global" || w == ".shared" || w == ".const" || w == ".local" ||
               w == ".volatile" || w == ".generic") {
      } else if (w == ".attribute")
        L.skip_to(')');
      else {
        t = ty_parse(w.substr(1));
        if (t == T_NONE) L.fail("unknown type " + std::string(w));
      }
    } else
      break;
  }
  v.name = std::string(L.word());
  uint64_t n = 1;
  bool arr = false;
  while (L.eat('[')) {
    Operand d;
    arr = true;
    if (L.peek() == ']') {
      n = 0;
      v.ext = true;
    } else {
      L.number(d);
      n *= d.bits;
    }
    L.need(']');
  }
  (void)arr;
  v.size = n * ty_size(t) * vec;
  if (!align_given) v.align = std::max(1, ty_size(t) * vec);
  return v;
}
struct Init {
  std::string sym;
  int64_t add;
  uint64_t bits;
  int kind; /*0 bits 1 sym*/
  uint64_t mask;
};

Module* module_from_ptx(const std::string& text, const std::string& origin) {
  auto* m = new Module;
  m->text = text;
  m->origin = origin;
  m->line_start.push_back(0);
  for (size_t i = 0; i < text.size(); ++i)
    if (text[i] == '\n') m->line_start.push_back(i + 1);
  Lex L(*m, 0, text.size(), 1);
  struct Fill {
    std::string name;
    int esize;
    std::vector<Operand> vals;
  };
  std::vector<Fill> fills;
  while (!L.done()) {
    if (L.peek() == 0 || (unsigned char)L.peek() > 127) break;
    std::string_view w = L.word();
    if (w.empty()) {
      if (L.eat(';')) continue;
      if (L.t[L.p] == '\0') break;
      L.fail("unexpected character at module level");
    }
    if (w == ".version" || w == ".target" || w == ".address_size" || w == ".file") {
      L.skip_line();
      continue;
    }
    if (w == ".section") {
      L.skip_to('{');
      --L.p;
      L.skip_braces();
      continue;
    }
    if (w == ".pragma" || w == ".alias") {
      L.skip_to(';');
      continue;
    }
    bool ext = false;
    while (w == ".visible" || w == ".weak" || w == ".extern" || w == ".common") {
      if (w == ".extern") ext = true;
      w = L.word();
    }
    if (w == ".global" || w == ".const" || w == ".shared") {
      size_t p0 = L.p;
      uint32_t l0 = L.line;
      // element size, for initializers
      int esize = 1;
      {
        Lex P(*m, p0, text.size(), l0);
        while (P.peek() == '.') {
          auto x = P.word();
          Ty t = ty_parse(x.substr(1));
          if (t) {
            esize = ty_size(t);
          } else if (x == ".align") {
            Operand n;
            P.number(n);
          } else if (x == ".attribute")
            P.skip_to(')');
        }
      }
      Var v = parse_var(L, w == ".global" ? 'g' : w == ".const" ? 'c' : 's');
      v.ext = ext;
      if (L.eat('=')) {
        Fill f;
        f.name = v.name;
        f.esize = esize;
        std::function<void()> item = [&] {
          if (L.eat('{')) {
            if (L.eat('}')) return;
            do item();
            while (L.eat(','));
            L.need('}');
            return;
          }
          Operand o;
          if (L.peek() == '-' || isdigit((unsigned char)L.peek())) {
            o = L.operand();
            if (L.peek() == '(') {
              L.fail("masked symbol initializer is not supported");
            }
          } else {
            std::string s(L.word());
            o.k = Operand::SYM;
            if (s == "generic") {
              L.need('(');
              s = std::string(L.word());
              L.need(')');
            }
            o.s = s;
            if (L.eat('+')) {
              Operand n = L.operand();
              o.off = (int64_t)n.bits;
            }
          }
          f.vals.push_back(o);
        };
        item();
        fills.push_back(f);
      }
      L.need(';');
      m->vars[v.name] = v;
      continue;
    }
    if (w == ".entry" || w == ".func") {
      FuncSrc f;
      f.entry = w == ".entry";
      auto plist = [&](std::vector<Var>& out) {
        L.need('(');
        if (L.eat(')')) return;
        do {
          std::string_view k = L.word();
          if (k != ".param" && k != ".reg") L.fail("expected .param");
          out.push_back(parse_var(L, 'p'));
        } while (L.eat(','));
        L.need(')');
      };
      if (L.peek() == '.') {
        L.skip_to(')');
      }  // .attribute(...)
      if (L.peek() == '(') plist(f.rets);
      f.name = std::string(L.word());
      if (L.peek() == '(') plist(f.params);
      while (L.peek() == '.') {
        std::string_view d = L.word();
        if (d == ".maxntid" || d == ".reqntid") {
          uint64_t n = 1;
          do {
            Operand x;
            L.number(x);
            n *= x.bits;
          } while (L.eat(','));
          f.max_threads = (uint32_t)n;
        } else if (d == ".pragma")
          L.skip_to(';');
        else
          while (L.p < L.end) {
            Operand x;
            if (isdigit((unsigned char)L.peek())) {
              L.number(x);
              if (!L.eat(',')) break;
            } else
              break;
          }
      }
      if (L.peek() == '{') {
        f.line = L.line;
        f.body_lo = L.p;
        L.skip_braces();
        f.body_hi = L.p;
        f.defined = true;
      } else
        L.need(';');
      auto it = m->funcs.find(f.name);
      if (it == m->funcs.end() || f.defined) m->funcs[f.name] = f;
      continue;
    }
    L.fail("unknown directive " + std::string(w));
  }
  // place global and const variables
  for (auto& e : m->vars) {
    Var& v = e.second;
    if (v.space == 's') continue;
    void* p = mem_alloc(std::max<uint64_t>(v.size, 1), A_MODULE);
    memset(p, 0, v.size);
    v.addr = (uint64_t)p;
  }
  for (auto& f : fills) {
    Var& v = m->vars[f.name];
    uint64_t a = v.addr;
    for (auto& o : f.vals) {
      uint64_t bits = o.bits;
      if (o.k == Operand::SYM) {
        auto it = m->vars.find(o.s);
        if (it == m->vars.end())
          bits = 0;  // function pointer tables: calls through them are reported
        else
          bits = it->second.addr + o.off;
      } else if (o.fk == 3) {
        if (f.esize == 4) {
          float x = (float)o.dec;
          uint32_t y;
          memcpy(&y, &x, 4);
          bits = y;
        } else
          memcpy(&bits, &o.dec, 8);
      }
      if (a + f.esize <= v.addr + v.size) memcpy((void*)a, &bits, f.esize);
      a += f.esize;
    }
  }
  return m;
}
bool module_has(Module* m, const std::string& n) {
  auto i = m->funcs.find(n);
  return i != m->funcs.end() && i->second.entry;
}
std::vector<std::string> module_entries(Module* m) {
  std::vector<std::string> r;
  for (auto& f : m->funcs)
    if (f.second.entry) r.push_back(f.first);
  return r;
}
void* module_global(Module* m, const std::string& n, size_t* size) {
  auto i = m->vars.find(n);
  if (i == m->vars.end() || i->second.space == 's') return nullptr;
  if (size) *size = i->second.size;
  return (void*)i->second.addr;
}

// ---------------------------------------------------------------- function bodies
struct Sym {
  char kind; /* r reg, s shared, l local, p kernel param (absolute), q frame param (local), L label,
                t targets */
  Opn reg;
  uint64_t val = 0;
  std::vector<std::string> names;
};
struct Scope {
  std::unordered_map<std::string, Sym> syms;
};

struct Decoder : Builder {
  Module* m;
  Kernel* k;
  FuncSrc* f = nullptr;
  Lex* L = nullptr;
  std::vector<int> chain;     // open scopes
  std::vector<Scope> scopes;  // all scopes of the current function
  std::map<std::pair<uint64_t, int>, Opn> const_map;
  std::map<std::string, uint64_t> shared_at;  // module-level shared variables used
  std::map<std::string, uint32_t> func_entry;
  struct Frame {
    std::vector<uint32_t> ret_off, param_off;
    std::vector<uint32_t> ret_size, param_size;
  };
  std::map<std::string, Frame> frames;
  std::vector<std::string> stack;  // functions being decoded (recursion check)
  struct Fix {
    uint32_t inst;
    int slot;
    std::string label;
    std::vector<int> chain;
    uint32_t line;
  };
  std::vector<Fix> fixes;
  uint32_t smem = kSmemStatic;
  uint32_t cur_line = 0;

  [[noreturn]] void fail(const std::string& why) override {
    die("PTX: " + why + "\n    kernel " + demangle(k->name) + "\n    " + m->origin + " line " +
        std::to_string(cur_line) + ": " + module_line(m, cur_line));
  }
  uint32_t bump(uint32_t& v, uint32_t size, uint32_t align) {
    v = (v + align - 1) / align * align;
    uint32_t r = v;
    v += size;
    return r;
  }
  Opn new_reg(int size) {
    Opn o;
    o.size = (uint8_t)size;
    o.off = (int32_t)bump(k->reg_bytes, 32 * size, 64);
    k->nregs++;
    return o;
  }
  Opn cst(uint64_t bits, int size) override {
    if (size < 8) bits &= (1ull << (8 * size)) - 1;
    auto key = std::make_pair(bits, size);
    auto it = const_map.find(key);
    if (it != const_map.end()) return it->second;
    Opn o = new_reg(size);
    k->consts.push_back({(uint32_t)o.off, (uint8_t)size, bits});
    return const_map[key] = o;
  }
  Opn scratch(int size) override { return new_reg(size); }
  Opn sreg(const std::string& n) override {
    auto it = k->sregs.find(n);
    if (it != k->sregs.end()) return it->second;
    return k->sregs[n] = new_reg(n == "%gridid" || n == "%clock64" || n == "%globaltimer" ? 8 : 4);
  }
  Sym* find(const std::string& n) {
    for (size_t i = chain.size(); i--;) {
      auto& s = scopes[chain[i]].syms;
      auto it = s.find(n);
      if (it != s.end()) return &it->second;
    }
    return nullptr;
  }
  bool is_sreg(const Operand& o) override { return o.k == Operand::REG && !find(o.s); }
  // address of a symbol as a number (shared/local: offset in that space; else absolute)
  bool sym_value(const std::string& n, uint64_t& v, char& kind) {
    if (Sym* s = find(n)) {
      if (s->kind == 'r' || s->kind == 'L' || s->kind == 't') return false;
      v = s->val;
      kind = s->kind;
      return true;
    }
    auto it = m->vars.find(n);
    if (it == m->vars.end()) return false;
    Var& x = it->second;
    if (x.space == 's') {
      kind = 's';
      if (x.ext || x.size == 0) {
        v = kSmemDyn;
        return true;
      }
      auto s = shared_at.find(n);
      if (s == shared_at.end())
        s = shared_at.emplace(n, bump(smem, (uint32_t)x.size, x.align)).first;
      v = s->second;
      return true;
    }
    kind = x.space;
    v = x.addr;
    return true;
  }
  Opn reg(const Operand& o, int size) override {
    if (o.k == Operand::SINK) return scratch(size ? size : 8);
    if (o.k == Operand::REG || o.k == Operand::SYM) {
      if (Sym* s = find(o.s))
        if (s->kind == 'r') {
          Opn r = s->reg;
          r.neg = o.neg;
          return r;
        }
      uint64_t v;
      char kd;
      if (sym_value(o.s, v, kd)) return cst(v + o.off, size ? size : 8);
      if (o.k == Operand::REG) {
        if (o.s == "%pt" || o.s == "%pf") {
          Opn r = cst(o.s == "%pt", 1);
          r.neg = o.neg;
          return r;
        }
        return sreg(o.s);
      }
      if (o.s == "WARP_SZ") return cst(32, size ? size : 4);
      fail("unknown symbol " + o.s);
    }
    if (o.k == Operand::IMM) {
      if (o.fk == 3) {
        float x = (float)o.dec;
        uint32_t b;
        memcpy(&b, &x, 4);
        uint64_t d;
        memcpy(&d, &o.dec, 8);
        return size == 8 ? cst(d, 8) : cst(b, 4);
      }
      return cst(o.bits, size ? size : 8);
    }
    fail("operand not understood");
  }
  Opn typed(const Operand& o, Ty t) override {
    if (o.k == Operand::IMM) {
      uint64_t b = o.bits;
      double d = 0;
      bool isf = o.fk != 0;
      if (o.fk == 1) {
        uint32_t x = (uint32_t)o.bits;
        float fl;
        memcpy(&fl, &x, 4);
        d = fl;
      }
      if (o.fk == 2) memcpy(&d, &o.bits, 8);
      if (o.fk == 3) d = o.dec;
      if (isf) {
        if (t == F32 || t == B32 || t == U32 || t == S32) {
          float fl = (float)d;
          uint32_t x;
          memcpy(&x, &fl, 4);
          b = o.fk == 1 ? o.bits : x;
        } else if (t == F64 || t == B64)
          memcpy(&b, &d, 8);
        else
          fail("float immediate for this type");
      } else if (t == F32 && o.fk == 0) { /* integer literal as bits is not valid PTX for f32, but
                                             "0" and "1" appear in inline asm */
        float fl = (float)(int64_t)o.bits;
        uint32_t x;
        memcpy(&x, &fl, 4);
        b = x;
      } else if (t == F64 && o.fk == 0) {
        double dd = (double)(int64_t)o.bits;
        memcpy(&b, &dd, 8);
      }
      return cst(b, ty_size(t));
    }
    return reg(o, ty_size(t));
  }
  void mem(Inst& I, const Operand& o, bool param_space) override {
    if (o.k != Operand::MEM) fail("expected an address");
    I.imm = o.off;
    if (o.s.empty()) {
      I.a = cst(0, 8);
      return;
    }
    if (Sym* s = find(o.s))
      if (s->kind == 'r') {
        I.a = s->reg;
        if (param_space) I.space = f->entry ? SP_PARAM : SP_LOCAL;
        return;
      }
    uint64_t v;
    char kd;
    if (!sym_value(o.s, v, kd)) fail("unknown symbol in address: " + o.s);
    I.a = cst(v, 8);
    if (kd == 'p') I.space = SP_PARAM;
    if (kd == 'q') I.space = SP_LOCAL;
    if (I.space == SP_GENERIC) {
      if (kd == 's') I.space = SP_SHARED;
      if (kd == 'l') I.space = SP_LOCAL;
      if (kd == 'c') I.space = SP_CONST;
    }
  }

  void declare_reg() {  // after ".reg"
    std::string_view tw = L->word();
    int vec = 1;
    if (tw == ".v2" || tw == ".v4") {
      fail("vector registers are not supported");
    }
    (void)vec;
    Ty t = ty_parse(tw.substr(1));
    if (!t) fail("unknown register type " + std::string(tw));
    int sz = ty_size(t);
    do {
      std::string n(L->word());
      if (L->eat('<')) {
        Operand c;
        L->number(c);
        L->need('>');
        for (uint64_t i = 0; i < c.bits; ++i) {
          Sym s;
          s.kind = 'r';
          s.reg = Opn{-1, (uint8_t)sz};
          pending_reg(n + std::to_string(i), s, sz);
        }
      } else {
        Sym s;
        s.kind = 'r';
        pending_reg(n, s, sz);
      }
    } while (L->eat(','));
    L->need(';');
  }
  void pending_reg(const std::string& n, Sym s, int sz) {
    s.reg = new_reg(sz);
    scopes[chain.back()].syms[n] = s;
  }

  void place_var(char space) {
    Var v = parse_var(*L, space);
    while (true) {
      Sym s;
      s.kind = space == 'p' ? 'q' : space;
      if (space == 's')
        s.val = (v.size == 0) ? kSmemDyn : bump(smem, (uint32_t)v.size, v.align);
      else if (space == 'g' || space == 'c') {
        void* p = mem_alloc(v.size, A_MODULE);
        memset(p, 0, v.size);
        s.val = (uint64_t)p;
      } else
        s.val = bump(k->local_bytes, (uint32_t)std::max<uint64_t>(v.size, 1),
                     std::max<uint32_t>(v.align, 4));
      scopes[chain.back()].syms[v.name] = s;
      if (!L->eat(',')) break;
      Var v2 = v;
      v2.name = std::string(L->word());
      v = v2;
    }
    if (L->eat('=')) {
      L->skip_to(';');
      return;
    }
    L->need(';');
  }

  Inst& emit() {
    k->code.emplace_back();
    Inst& I = k->code.back();
    I.line = cur_line;
    return I;
  }

  void decode_function(const std::string& name) {
    auto it = m->funcs.find(name);
    if (it == m->funcs.end() || !it->second.defined) {
      fail("call of undefined function " + name);
    }
    for (auto& s : stack)
      if (s == name) fail("recursive device function " + name + " is not supported");
    stack.push_back(name);
    FuncSrc* of = f;
    Lex* oL = L;
    auto ochain = chain;
    auto oscopes = std::move(scopes);
    uint32_t oline = cur_line;
    auto ofixes = std::move(fixes);
    f = &it->second;
    chain.clear();
    scopes.clear();
    fixes.clear();
    // callees first, so that they have lower pcs (the scheduler runs low pcs first)
    {
      std::unordered_set<std::string> seen;
      Lex S(*m, f->body_lo, f->body_hi, f->line);
      const std::string& t = m->text;
      for (size_t p = f->body_lo; (p = t.find("call", p)) != std::string::npos && p < f->body_hi;
           p += 4) {
        size_t e = t.find(';', p);
        if (e == std::string::npos) break;
        if (p && (Lex::idc(t[p - 1]) || t[p - 1] == '.')) continue;
        // find known function names among the words of the statement
        size_t q = p;
        while (q < e) {
          while (q < e && !Lex::idc(t[q])) ++q;
          size_t a = q;
          while (q < e && Lex::idc(t[q])) ++q;
          std::string w = t.substr(a, q - a);
          auto fi = m->funcs.find(w);
          if (fi != m->funcs.end() && fi->second.defined && !fi->second.entry &&
              !func_entry.count(w) && seen.insert(w).second)
            decode_function(w);
        }
      }
    }
    Lex lx(*m, f->body_lo, f->body_hi, f->line);
    L = &lx;
    scopes.emplace_back();
    chain.push_back(0);
    Frame fr;
    if (f->entry) {
      uint32_t off = 0;
      for (auto& p : f->params) {
        off = (off + p.align - 1) / p.align * p.align;
        Sym s;
        s.kind = 'p';
        s.val = (uint64_t)k->param_buf + off;
        scopes[0].syms[p.name] = s;
        k->params.push_back({off, (uint32_t)p.size});
        off += (uint32_t)p.size;
      }
      k->param_bytes = off;
    } else {
      for (auto* lst : {&f->rets, &f->params})
        for (auto& p : *lst) {
          Sym s;
          s.kind = 'q';
          s.val = bump(k->local_bytes, (uint32_t)std::max<uint64_t>(p.size, 1),
                       std::max<uint32_t>(p.align, 8));
          scopes[0].syms[p.name] = s;
          (lst == &f->rets ? fr.ret_off : fr.param_off).push_back((uint32_t)s.val);
          (lst == &f->rets ? fr.ret_size : fr.param_size).push_back((uint32_t)p.size);
        }
    }
    frames[name] = fr;
    func_entry[name] = (uint32_t)k->code.size();
    if (f->entry) k->entry = (uint32_t)k->code.size();
    L->need('{');
    int depth = 1;
    while (depth) {
      char c = L->peek();
      cur_line = L->line;
      if (c == 0) fail("unexpected end of function");
      if (c == '}') {
        ++L->p;
        --depth;
        if (depth) chain.pop_back();
        continue;
      }
      if (c == '{') {
        ++L->p;
        ++depth;
        scopes.emplace_back();
        chain.push_back((int)scopes.size() - 1);
        continue;
      }
      if (c == ';') {
        ++L->p;
        continue;
      }
      if (c == '.') {
        size_t save = L->p;
        std::string_view w = L->word();
        if (w == ".reg")
          declare_reg();
        else if (w == ".local")
          place_var('l');
        else if (w == ".param")
          place_var('p');
        else if (w == ".shared")
          place_var('s');
        else if (w == ".global" || w == ".const")
          place_var(w[1]);
        else if (w == ".loc" || w == ".file")
          L->skip_line();
        else if (w == ".pragma" || w == ".maxnreg")
          L->skip_to(';');
        else {
          (void)save;
          fail("unknown directive " + std::string(w));
        }
        continue;
      }
      statement();
    }
    Inst& I = emit();  // fall off the end
    if (f->entry) {
      I.ctl = C_EXIT;
    } else
      I.ctl = C_RET;
    for (auto& x : fixes) {
      Sym* s = nullptr;
      for (size_t i = x.chain.size(); i-- && !s;) {
        auto& y = scopes[x.chain[i]].syms;
        auto q = y.find(x.label);
        if (q != y.end()) s = &q->second;
      }
      cur_line = x.line;
      if (!s) fail("unknown label " + x.label);
      if (s->kind == 't') {
        for (auto& n : s->names) {
          Sym* t = nullptr;
          for (size_t i = x.chain.size(); i-- && !t;) {
            auto& y = scopes[x.chain[i]].syms;
            auto q = y.find(n);
            if (q != y.end()) t = &q->second;
          }
          if (!t) fail("unknown label " + n);
          k->code[x.inst].targets.push_back((uint32_t)t->val);
        }
      } else
        k->code[x.inst].target = (uint32_t)s->val;
    }
    stack.pop_back();
    f = of;
    L = oL;
    chain = ochain;
    scopes = std::move(oscopes);
    cur_line = oline;
    fixes = std::move(ofixes);
  }

  void statement() {
    bool has_pred = false;
    Operand pred;
    if (L->eat('@')) {
      has_pred = true;
      pred = L->operand();
    }
    size_t save = L->p;
    uint32_t sl = L->line;
    std::string_view opw = L->opword();
    if (!has_pred && L->peek() == ':') {
      // label (possibly ".branchtargets" or prototypes after it)
      ++L->p;
      Sym s;
      s.kind = 'L';
      s.val = k->code.size();
      std::string name(opw);
      char c = L->peek();
      if (c == '.') {
        size_t p2 = L->p;
        uint32_t l2 = L->line;
        std::string_view w = L->word();
        if (w == ".branchtargets") {
          s.kind = 't';
          do s.names.push_back(std::string(L->word()));
          while (L->eat(','));
          L->need(';');
        } else if (w == ".callprototype") {
          L->skip_to(';');
        } else {
          L->p = p2;
          L->line = l2;
        }
      }
      scopes[chain.back()].syms[name] = s;
      return;
    }
    // opword() may have swallowed the ':' of a label written without space: "$L__BB0_1:" is handled
    // above
    if (opw.empty()) {
      L->p = save;
      L->line = sl;
      fail("instruction expected");
    }
    cur_line = L->line;
    std::vector<std::string_view> op;
    for (size_t a = 0; a <= opw.size();) {
      size_t b = opw.find('.', a);
      if (b == std::string_view::npos) b = opw.size();
      op.push_back(opw.substr(a, b - a));
      a = b + 1;
    }
    std::vector<Operand> args;
    if (L->peek() != ';') do
        args.push_back(L->operand());
      while (L->eat(','));
    L->need(';');
    Inst I;
    I.line = cur_line;
    if (has_pred) {
      Opn p = reg(pred, 1);
      I.pred = p.off;
      I.pred_neg = pred.neg;
    }
    std::string_view b = op[0];
    if (b == "bra") {
      I.ctl = C_BRA;
      fixes.push_back({(uint32_t)k->code.size(), 0, args[0].s, chain, cur_line});
    } else if (b == "brx") {
      I.ctl = C_BRX;
      I.a = reg(args[0], 4);
      fixes.push_back({(uint32_t)k->code.size(), 1, args[1].s, chain, cur_line});
    } else if (b == "exit")
      I.ctl = C_EXIT;
    else if (b == "ret")
      I.ctl = f->entry ? C_EXIT : C_RET;
    else if (b == "trap" || b == "brkpt")
      I.ctl = C_TRAP;
    else if (b == "call") {
      call(I, args);
      return;
    } else
      gs::bind(*this, I, op, args);
    k->code.push_back(std::move(I));
  }

  void copy_local(uint32_t dst, uint32_t srcoff, uint32_t size, const Inst& proto) {
    for (uint32_t o = 0; o < size;) {
      int n = size - o >= 8 && (dst + o) % 8 == 0 && (srcoff + o) % 8 == 0   ? 8
              : size - o >= 4 && (dst + o) % 4 == 0 && (srcoff + o) % 4 == 0 ? 4
                                                                             : 1;
      Opn t = new_reg(n == 1 ? 2 : n);
      Inst ld;
      ld.line = cur_line;
      ld.pred = proto.pred;
      ld.pred_neg = proto.pred_neg;
      ld.space = SP_LOCAL;
      ld.size = (uint8_t)n;
      ld.a = cst(srcoff + o, 8);
      ld.ops = {t};
      ld.kind = K_LD;
      ld.fn = ld_fn(n, 1);
      Inst st = ld;
      st.a = cst(dst + o, 8);
      st.kind = K_ST;
      st.fn = st_fn(n, 1);
      k->code.push_back(ld);
      k->code.push_back(st);
      o += n;
    }
  }
  void call(Inst I, std::vector<Operand>& a) {
    std::vector<Operand> rets, params;
    std::string fn;
    size_t i = 0;
    if (i < a.size() && a[i].k == Operand::LIST) rets = a[i++].v;
    if (i >= a.size()) fail("bad call");
    if (a[i].k == Operand::REG) fail("indirect calls are not supported");
    fn = a[i++].s;
    if (i < a.size() && a[i].k == Operand::LIST) params = a[i++].v;
    if (fn == "vprintf" || fn == "__assertfail" || fn == "malloc" || fn == "free") {
      I.sub = fn == "vprintf" ? 1 : fn == "__assertfail" ? 2 : 3;
      if (I.sub == 3) fail("device-side " + fn + " is not supported");
      for (auto& p : params) {
        Sym* s = find(p.s);
        if (!s || s->kind != 'q') fail("call argument");
        I.ops.push_back(cst(s->val, 8));
      }
      if (!rets.empty()) {
        Sym* s = find(rets[0].s);
        I.d = cst(s ? s->val : 0, 8);
      }
      extern void h_syscall(Warp&, const Inst&, uint32_t);
      I.fn = h_syscall;
      k->code.push_back(I);
      return;
    }
    auto fe = func_entry.find(fn);
    if (fe == func_entry.end()) fail("call of undefined function " + fn);
    Frame& fr = frames[fn];
    for (size_t j = 0; j < params.size() && j < fr.param_off.size(); ++j) {
      Sym* s = find(params[j].s);
      if (s && s->kind == 'q')
        copy_local(fr.param_off[j], (uint32_t)s->val, fr.param_size[j], I);
      else {  // register or immediate argument
        Inst st;
        st.line = cur_line;
        st.pred = I.pred;
        st.pred_neg = I.pred_neg;
        st.space = SP_LOCAL;
        st.size = (uint8_t)fr.param_size[j];
        st.a = cst(fr.param_off[j], 8);
        st.ops = {reg(params[j], fr.param_size[j])};
        st.kind = K_ST;
        st.fn = st_fn(fr.param_size[j], 1);
        k->code.push_back(st);
      }
    }
    I.ctl = C_CALL;
    I.target = fe->second;
    k->code.push_back(I);
    for (size_t j = 0; j < rets.size() && j < fr.ret_off.size(); ++j) {
      Sym* s = find(rets[j].s);
      if (s && s->kind == 'q')
        copy_local((uint32_t)s->val, fr.ret_off[j], fr.ret_size[j], I);
      else {
        Inst ld;
        ld.line = cur_line;
        ld.pred = I.pred;
        ld.pred_neg = I.pred_neg;
        ld.space = SP_LOCAL;
        ld.size = (uint8_t)fr.ret_size[j];
        ld.a = cst(fr.ret_off[j], 8);
        ld.ops = {reg(rets[j], fr.ret_size[j])};
        ld.kind = K_LD;
        ld.fn = ld_fn(fr.ret_size[j], 1);
        k->code.push_back(ld);
      }
    }
  }
};

Kernel* module_kernel(Module* m, const std::string& name) {
  auto it = m->kernels.find(name);
  if (it != m->kernels.end()) return it->second;
  if (!module_has(m, name)) return nullptr;
  auto* k = new Kernel;
  k->name = name;
  k->mod = m;
  k->max_threads = m->funcs[name].max_threads;
  k->param_buf =
      (uint8_t*)mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Decoder d;
  d.m = m;
  d.k = k;
  d.decode_function(name);
  k->smem_static = d.smem;
  k->local_bytes = (k->local_bytes + 15) / 16 * 16;
  if (d.smem > kSmemDyn)
    die("kernel " + demangle(name) + ": more than 63 KB of static shared memory");
  m->kernels[name] = k;
  return k;
}
const std::vector<ParamInfo>& kernel_params(Kernel* k) { return k->params; }
uint32_t kernel_param_bytes(Kernel* k) { return k->param_bytes; }
const std::string& kernel_name(Kernel* k) { return k->name; }
KernelInfo kernel_info(Kernel* k) {
  return {k->smem_static - kSmemStatic, k->local_bytes, std::min<uint32_t>(255, k->nregs / 3 + 8),
          k->max_threads};
}
}  // namespace gs
