package tests

import (
	"encoding/json"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/weftnet/weft/"

// arrows is the import diagram of docs/architecture.md: for each package, which
// of ours it may import.
var arrows = map[string][]string{
	"store":                {},
	"store/gossip":         {"store"},
	"driver":               {"store"},
	"ipam":                 {"store"},
	"dataplane":            {"store"},
	"dataplane/kernel":     {"dataplane", "dataplane/kernel/bpf", "store"},
	"dataplane/kernel/bpf": {},
	"dataplane/kerneltest": {"dataplane", "store"},
	"plugin":               {"driver", "ipam", "dataplane", "dataplane/kernel", "store", "store/gossip"},
	"tests":                {},
	"tests/hosts":          {},
	"tests/show":           {"tests/hosts"},
	"tests/demo":           {"tests/hosts", "tests/show"},
	"tests/demoswarm":      {"tests/hosts", "tests/show"},
	"tests/demoencrypted":  {"tests/hosts", "tests/show"},
	"tests/peer":           {"store", "store/gossip"},
	"tests/bench":          {"store", "tests/hosts", "tests/peer"},
	"tests/sim":            {},
}

// owners says which package alone may import a dependency, and why.
var owners = []struct{ dependency, owner, why string }{
	{"github.com/vishvananda/netlink", "dataplane/kernel", "everything else must think without a kernel"},
	{"github.com/vishvananda/netns", "dataplane/kerneltest", "only tests enter namespaces"},
	{"github.com/coreos/go-iptables", "dataplane/kernel", "rules are kernel objects"},
	{"github.com/safchain/ethtool", "dataplane/kernel", "offloads are properties of links"},
	{"github.com/cilium/ebpf", "dataplane/kernel", "programs and maps are kernel objects"},
	{"golang.zx2c4.com/wireguard", "dataplane/kernel", "devices that encrypt are kernel objects, also those of this process"},
	{"github.com/hashicorp/memberlist", "store/gossip", "membership can be replaced without touching the rest"},
	{"go.etcd.io/bbolt", "store", "the database is a concrete type; nobody sees its pages"},
	{"github.com/prometheus/client_golang", "plugin", "packages count in plain numbers; the process exports them"},
}

type goPackage struct {
	ImportPath string
	Imports    []string
}

func TestArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
	for {
		var p goPackage
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, known := arrows[name]
		if !known {
			t.Errorf("package %s is not in the diagram: say what it may import", name)
		}
		for _, imp := range p.Imports {
			if ours, ok := strings.CutPrefix(imp, module); ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s; it may import %v", name, ours, allowed)
			}
			for _, o := range owners {
				if strings.HasPrefix(imp, o.dependency) && name != o.owner && !strings.HasPrefix(name, o.owner+"/") && !strings.HasPrefix(name, "tests") {
					t.Errorf("%s imports %s; only %s may: %s", name, imp, o.owner, o.why)
				}
			}
		}
	}
	if seen < len(arrows)/2 {
		t.Fatalf("go list named %d packages", seen)
	}
}
