# Perl's Sys::Virt on the daemon whose URI is the first argument; the second is a domain's XML.
use strict;
use warnings;
use Sys::Virt;
use Sys::Virt::Domain;
use Sys::Virt::Event;

my ($uri, $file) = @ARGV;
open my $in, '<', $file or die "$file: $!";
my $xml = do { local $/; <$in> };
sub is { my ($got, $want, $what) = @_; die "$what: '$got', not '$want'\n" unless "$got" eq "$want"; }

Sys::Virt::Event::register_default();
my $conn = Sys::Virt->new(uri => $uri);
is($conn->get_type(), 'QEMU', 'type');
my @heard;
my $callback = $conn->domain_event_register_any(undef, Sys::Virt::Domain::EVENT_ID_LIFECYCLE,
    sub { my ($c, $dom, $event, $detail) = @_; push @heard, $event });
my $dom = $conn->define_domain($xml);
is($dom->is_persistent(), 1, 'persistent');
my @all = $conn->list_all_domains();
is(scalar @all, 1, 'domains');
$dom->create(Sys::Virt::Domain::START_PAUSED);
my ($state) = $dom->get_state();
is($state, Sys::Virt::Domain::STATE_PAUSED, 'state');
is($dom->get_info()->{nrVirtCpu}, 1, 'vCPUs');
$dom->destroy();
$dom->undefine();
my $end = time + 30;
while (!(grep { $_ == 1 } @heard) && time < $end) { Sys::Virt::Event::run_default(); }
# Defined, started, suspended, stopped, undefined.
# Whether the guest's end is told before its stop depends on how it takes it (6).
is(join(' ', grep { $_ != 6 } @heard), '0 2 3 5 1', 'events');
eval { $conn->get_domain_by_name('nobody') };
is(ref $@, 'Sys::Virt::Error', 'error');
is($@->code, Sys::Virt::Error::ERR_NO_DOMAIN, 'its code');
$conn->domain_event_deregister_any($callback);
print "all is well\n";
