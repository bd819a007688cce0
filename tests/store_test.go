package tests

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// damages are what may happen to the database while nobody has it open.
// One that is away comes first: later ones leave files behind.
var damages = []struct {
	name string
	kept bool   // the file is set aside
	said string // by weft status
	do   func(file string) error
}{
	{"away", false, "there was no database", os.Remove},
	// Behind the two pages that tell of the others.
	{"cut off", true, "was damaged", func(file string) error { return os.Truncate(file, 3*4096) }},
	{"filled with random bytes", true, "was damaged", func(file string) error {
		raw, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		random := rand.NewChaCha8([32]byte{1})
		_, _ = random.Read(raw) // never fails
		return os.WriteFile(file, raw, 0o600)
	}},
	{"empty", true, "was damaged", func(file string) error { return os.Truncate(file, 0) }},
}

// TestDamagedDatabaseIsRebuilt damages the database of one host, and demands that
// it is set aside and said, and that networks, endpoints and published ports come back
// from the kernel without a lost packet.
func TestDamagedDatabaseIsRebuilt(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 2, nil)
	install(t, lab, pluginDir(t, "failpoint", "crash"))
	a := lab.Hosts[0]
	createNetwork(t, lab, "app", 32, "--ipam-driver", hosts.PluginName)
	probe, from, to := probePair(t, lab, "app")
	second := run(t, a, "second", "--network", "app")
	createNetwork(t, lab, "own", 33, "-o", "gateway=weft", "--gateway", "10.33.0.1")
	web := run(t, a, "web", "--network", "own", "-p", "8080:80", "-p", "127.0.0.1:8081:80")
	serve(t, web, "web")
	ports := func() string {
		out, err := a.Exec(t.Context(), "weft", "ports")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	published := ports()
	toAddress := addressOf(t, to, "app").String()
	taken := []string{addressOf(t, from, "app").String(), addressOf(t, second, "app").String()}
	before := inventory(t, a)
	file := databaseFile(t, a)

	aside := 0
	for _, d := range damages {
		whileDisabled(t, a, func() {
			if err := d.do(file); err != nil {
				t.Fatal(err)
			}
		})
		if d.kept {
			aside++
		}
		eventually(t, 10*time.Second, "the damaged file is set aside", func(context.Context) error {
			files, err := filepath.Glob(file + ".bad-*")
			if err == nil && len(files) != aside {
				err = fmt.Errorf("%d files are set aside: %v", len(files), files)
			}
			return err
		})
		eventually(t, 10*time.Second, d.name+": weft status says it", func(ctx context.Context) error {
			status, _ := a.Exec(ctx, "weft", "status") // there is a problem, so it exits with 1
			if !strings.Contains(status, d.said) || !strings.Contains(status, "2 networks, 3 endpoints") {
				return errors.New(status)
			}
			return nil
		})
		unleaked(t, a, before, "plugin file")
		if got := ports(); got != published {
			t.Errorf("%s: weft ports shows\n%s\nwant\n%s", d.name, got, published)
		}
		fetches(t, lab.Hosts[1].NetNS(), "http://"+a.Address.String()+":8080", "web")
		fetches(t, a.NetNS(), "http://127.0.0.1:8081", "web")
		late := run(t, a, "late", "--network", "app")
		reach(t, late, toAddress)
		reach(t, to, addressOf(t, late, "app").String())
		for _, other := range taken {
			if got := addressOf(t, late, "app").String(); got == other {
				t.Errorf("%s: the address %s was given out twice", d.name, got)
			}
		}
		docker(t, a, "rm", "--force", "late")
		clean(t, a)
	}
	r := lossless(t, probe)
	figure(t, "damaged database", len(damages), "set aside and rebuilt from the kernel each time, %d of %d packets lost, TCP %s", r.Lost, r.Sent, broken(r))
}
